"""Checks of what public functions are given, plain enough for compilers to trace through."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch

from ringfx.errors import InvalidArgument

__all__ = ["choice", "number", "switch", "tensor", "text", "whole_number"]


def whole_number(
    where: str, name: str, value: Any, *, least: int = 1, most: int | None = None
) -> int:
    """An int, of Python or numpy; True is none."""
    kind = (
        f"an integer, {least} or more" if most is None else f"an integer from {least} to {most:,}"
    )
    if isinstance(value, bool | float | str | torch.Tensor) or not hasattr(value, "__index__"):
        raise _wrong(where, name, value, kind)
    found = operator.index(value)
    if found < least or (most is not None and found > most):
        raise _wrong(where, name, value, kind)
    return found


def number(where: str, name: str, value: Any, *, positive: bool = False) -> None:
    """A finite int or float."""
    kind = "a positive finite number" if positive else "a finite number"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong(where, name, value, kind)
    if not math.isfinite(value) or (positive and value <= 0):
        raise _wrong(where, name, value, kind)


def choice(where: str, name: str, value: Any, choices: Sequence[str]) -> None:
    """One of some words."""
    if not isinstance(value, str) or value not in choices:
        raise _wrong(where, name, value, "one of " + ", ".join(choices))


def switch(where: str, name: str, value: Any) -> None:
    """True or False, and not what counts as such."""
    if not isinstance(value, bool):
        raise _wrong(where, name, value, "True or False")


def text(where: str, name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise _wrong(where, name, value, "a string")


def tensor(where: str, name: str, value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        raise _wrong(where, name, value, "a torch.Tensor")


def _wrong(where: str, name: str, value: Any, expected: str) -> InvalidArgument:
    return InvalidArgument(f"{where}: {name} is {_shown(value)}. Do: pass {expected}.")


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor {tuple(value.shape)} {value.dtype}"
    is_long = isinstance(value, int) and abs(value) > 10**60  # Python shows no 5,000 digits
    said = "a number of more than 60 digits" if is_long else repr(value)
    return said if len(said) <= 60 else f"{said[:57]}..., a {type(value).__name__}"
