"""Steps of backward that are ours, which Dynamo must not take for the user's code.

Where a model asks for gradients itself, between two of its programs, Dynamo is awake while autograd
runs, and would compile the Python functions that autograd calls as further programs of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

from ringfx.torch_compat.dynamo_marks import not_traced

__all__ = ["Function", "register_autograd", "uncompiled"]

F = TypeVar("F", bound=Callable[..., Any])


class Function(torch.autograd.Function):
    """An autograd function whose backward runs as it is written."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.backward = staticmethod(not_traced(cls.backward))  # type: ignore[method-assign]


def register_autograd(operator: Any, backward: Callable[..., Any], **kwargs: Any) -> None:
    """``operator.register_autograd`` with a backward that runs as it is written."""
    operator.register_autograd(not_traced(backward), **kwargs)


def uncompiled(reason: str) -> Callable[[F], F]:
    """A function at which every program that Dynamo traces ends; what it calls may be compiled."""

    def decorate(function: F) -> F:
        return cast(F, torch.compiler.disable(function, reason=reason))

    return decorate
