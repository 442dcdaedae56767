"""Names that a caller misspelled, or left out: what there is, and the nearest."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ParamSpec, TypeVar

from ringfx.errors import InvalidArgument

__all__ = ["misfit", "named_arguments", "nearest", "unknown_option"]

P = ParamSpec("P")
R = TypeVar("R")


def nearest(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'strategy'?``, or nothing.

    >>> nearest("starategy", ["mesh", "strategy"])
    " Did you mean 'strategy'?"
    """
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def unknown_option(name: str, known: Iterable[str]) -> InvalidArgument:
    """The error for an option that is none of those that are known."""
    known = list(known)
    return InvalidArgument(
        f"unknown option {name!r}.{nearest(name, known)} Do: use one of {', '.join(known)}."
    )


def misfit(
    function: Callable[..., object], args: Sequence[object], kwargs: Mapping[str, object]
) -> str:
    """Why a function cannot be called so, in Python's words; empty if it can.

    >>> misfit(nearest, ["a"], {})
    "missing a required argument: 'known'"
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # it has none that Python knows
        return ""
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        return str(error)
    return ""


def named_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """The function, with calls that do not fit its arguments refused as every other mistake is.

    Python's own text neither suggests a name nor is caught as a RingfxError.
    """
    signature = inspect.signature(function)
    parameters = signature.parameters.values()
    by_name = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if not takes_any and name not in signature.parameters:
                raise unknown_option(name, by_name)
        if reason := misfit(function, args, kwargs):
            raise InvalidArgument(
                f"{function.__name__}: {reason}. Do: call ringfx.{function.__name__}"
                f"({_shown(signature)})."
            )
        return function(*args, **kwargs)

    return checked


def _shown(signature: inspect.Signature) -> str:
    """What a call must have, and that options go by name: ``model, *, world_size=..., ...``."""
    parts = [
        f"{p.name}=..." if p.kind is p.KEYWORD_ONLY else str(p.replace(annotation=p.empty))
        for p in signature.parameters.values()
        if p.kind is p.VAR_POSITIONAL
        or (p.default is p.empty and p.kind is not p.VAR_KEYWORD)
        or (p.default is not p.empty and p.kind is p.POSITIONAL_OR_KEYWORD)
    ]
    rest = any(
        p.kind is p.VAR_KEYWORD or (p.kind is p.KEYWORD_ONLY and p.default is not p.empty)
        for p in signature.parameters.values()
    )
    return ", ".join([*parts, *(["OPTION=..."] if rest else [])])
