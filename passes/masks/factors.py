"""What an expression without scores says that scores are multiplied with or added to.

A number, a truth value, or a mask of a huge factor: ``(1 - m) * -3e38``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.fx import Node

from ringfx.ir.tiles import Expr, const, walk
from ringfx.passes.exprs.additive import ABSORBS
from ringfx.passes.exprs.simplify import assuming, is_boolean, simplify

__all__ = ["as_number", "as_truth", "constants", "has_threshold", "threshold"]

_CASTS = frozenset({"float", "double", "half", "bfloat16", "int"})


def as_number(expr: Expr) -> float | None:
    """The number that an expression is; float64 writes what float32 would round as a cast of it."""
    if expr[0] == "double":
        return as_number(expr[1])
    return float(expr[1]) if expr[0] == "const" else None


def as_truth(factor: Expr, captured: Sequence[Node]) -> Expr | None:
    """The truth value that a factor of 0 and 1 is."""
    while factor[0] in _CASTS:
        factor = factor[1]
    if factor[0] == "at" and captured[factor[1]].meta["val"].dtype == torch.bool:
        return ("bool", factor)
    if is_boolean(factor):
        return factor
    conditions: Iterator[Expr] = (part[1] for part in walk(factor) if part[0] == "where")
    for condition in conditions:
        inside, outside = (assuming(factor, condition, value) for value in (True, False))
        pair = (inside[1], outside[1]) if inside[0] == "const" == outside[0] else None
        if pair == (1, 0):
            return condition
        if pair == (0, 1):
            return simplify("not", condition)
    return None


def constants(expr: Expr) -> list[float]:
    """The floating-point numbers inside an expression."""
    return [e[1] for e in walk(expr) if e[0] == "const" and isinstance(e[1], float)]


def threshold(term: Expr) -> Expr | None:
    """What a term keeps that masks by a huge factor of values not known here."""
    return ("gt", term, const(ABSORBS)) if any(c <= ABSORBS for c in constants(term)) else None


def has_threshold(keep: Expr | None) -> bool:
    """Whether a mask is read off huge factors, see ``threshold``."""
    return keep is not None and ABSORBS in constants(keep)
