"""Marks on functions that Dynamo reads, without loading Dynamo.

``torch.compiler.assume_constant_result`` and ``torch._dynamo.disable`` import Dynamo when they
decorate, seconds for those who call ``ringfx.ops`` alone. torch decorates its own functions as
here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch._compile import _disable_dynamo

__all__ = ["constant_result", "not_traced"]

F = TypeVar("F", bound=Callable[..., Any])


def constant_result(function: F) -> F:
    """Dynamo calls it while it traces, and takes the result as a constant of the program."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def not_traced(function: F) -> F:
    """Dynamo neither traces it nor compiles what it calls."""
    return _disable_dynamo(function)  # type: ignore[return-value]
