"""What a tile function can be on a whole tile, without evaluating it: interval arithmetic.

Every expression is bounded by an interval [lo, hi] over a box of indices; booleans are 0 and 1. A
mask whose interval is [0, 0] keeps nothing on the tile, [1, 1] keeps everything. Integers are
exact; what floating-point arithmetic could round is left unbounded, so that a classification is
never wrong, only sometimes "mixed" where a closer look would say more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from ringfx.ir.tiles.expr import INDICES, Expr

__all__ = ["Box", "Interval", "Kind", "bounds", "classify"]

Kind: TypeAlias = Literal["empty", "full", "mixed"]
Number: TypeAlias = int | float
Interval: TypeAlias = tuple[Number, Number]

UNKNOWN: Interval = (-math.inf, math.inf)
EITHER: Interval = (0, 1)


@dataclass(frozen=True, kw_only=True)
class Box:
    """Half-open ranges of batch, head, query and key indices, none of them empty."""

    b: tuple[int, int] = (0, 1)
    h: tuple[int, int] = (0, 1)
    q: tuple[int, int]
    k: tuple[int, int]
    row: tuple[int, int] | None = None
    """Places of the queries among this rank's own; None where they are not known."""


def classify(keep: Expr | None, box: Box, inputs: Sequence[torch.Tensor] | None = None) -> Kind:
    """Whether a mask keeps nothing, everything or something of a box.

    Parameters
    ----------
    keep
        The mask; None keeps everything.
    box
        Global indices of the tile.
    inputs
        The captured tensors; None makes whatever reads them unknown.
    """
    if keep is None:
        return "full"
    lo, hi = bounds(keep, box, inputs)
    if hi == 0:
        return "empty"
    return "full" if lo == hi == 1 else "mixed"


def bounds(expr: Expr, box: Box, inputs: Sequence[torch.Tensor] | None = None) -> Interval:
    """An interval that holds every value of the expression on the box."""
    head, *args = expr
    if head in INDICES:
        span: tuple[int, int] | None = getattr(box, head)
        return UNKNOWN if span is None else (span[0], span[1] - 1)
    if head == "const":
        value = args[0]
        return (int(value), int(value)) if isinstance(value, bool) else (value, value)
    if head == "at":
        return _read(args[0], [bounds(e, box, inputs) for e in args[1:]], inputs)
    rule = INTERVAL_RULES.get(head)
    return rule(*(bounds(e, box, inputs) for e in args)) if rule else UNKNOWN


def _read(
    position: int, places: Sequence[Interval], inputs: Sequence[torch.Tensor] | None
) -> Interval:
    """Extremes of a captured tensor over the ranges of its indices."""
    tensor = None if inputs is None else inputs[position]
    unknown = EITHER if tensor is not None and tensor.dtype == torch.bool else UNKNOWN
    if tensor is None or len(places) != tensor.dim():
        return unknown
    window = tensor.detach()
    for dim, (lo, hi) in enumerate(places):
        if not (_is_int(lo) and _is_int(hi) and lo >= 0 and hi < tensor.shape[dim]):
            return unknown
        window = window.narrow(dim, int(lo), int(hi) - int(lo) + 1)
    if window.dtype == torch.bool:
        window = window.to(torch.uint8)
    low, high = (extreme.item() for extreme in torch.aminmax(window))
    return unknown if math.isnan(low) or math.isnan(high) else (low, high)


def _is_int(value: Number) -> bool:
    return isinstance(value, int)


def _exact(*intervals: Interval) -> bool:
    """Whether arithmetic on these is exact: all ends are integers."""
    return all(_is_int(end) for interval in intervals for end in interval)


def _add(a: Interval, b: Interval) -> Interval:
    return (a[0] + b[0], a[1] + b[1]) if _exact(a, b) else UNKNOWN


def _neg(a: Interval) -> Interval:
    return -a[1], -a[0]


def _corners(operation: Callable[[Number, Number], Number]) -> Callable[..., Interval]:
    def rule(a: Interval, b: Interval) -> Interval:
        if not _exact(a, b):
            return UNKNOWN
        values = [operation(x, y) for x in a for y in b]
        return min(values), max(values)

    return rule


def _floordiv(a: Interval, b: Interval) -> Interval:
    return _corners(lambda x, y: x // y)(a, b) if _exact(a, b) and b[0] > 0 else UNKNOWN


def _truncdiv(a: Interval, b: Interval) -> Interval:
    return _floordiv(a, b) if _exact(a, b) and a[0] >= 0 else UNKNOWN


def _mod(a: Interval, b: Interval) -> Interval:
    if not _exact(a, b) or b[0] != b[1] or b[0] <= 0:
        return UNKNOWN
    if a[0] // b[0] == a[1] // b[0]:
        return a[0] % b[0], a[1] % b[0]
    return 0, b[0] - 1


def _abs(a: Interval) -> Interval:
    low = 0 if a[0] <= 0 <= a[1] else min(abs(a[0]), abs(a[1]))
    return low, max(abs(a[0]), abs(a[1]))


def _truth(always: bool, never: bool) -> Interval:
    return (1, 1) if always else (0, 0) if never else EITHER


def _le(a: Interval, b: Interval) -> Interval:
    return _truth(a[1] <= b[0], a[0] > b[1]) if _exact(a, b) else EITHER


def _lt(a: Interval, b: Interval) -> Interval:
    return _truth(a[1] < b[0], a[0] >= b[1]) if _exact(a, b) else EITHER


def _eq(a: Interval, b: Interval) -> Interval:
    if not _exact(a, b):  # floats are compared in the wider of two types, after rounding
        return EITHER
    return _truth(a[0] == a[1] == b[0] == b[1], a[1] < b[0] or b[1] < a[0])


def _not(a: Interval) -> Interval:
    truth = _bool(a)
    return 1 - truth[1], 1 - truth[0]


def _and(a: Interval, b: Interval) -> Interval:
    a, b = _bool(a), _bool(b)
    return min(a[0], b[0]), min(a[1], b[1])


def _or(a: Interval, b: Interval) -> Interval:
    a, b = _bool(a), _bool(b)
    return max(a[0], b[0]), max(a[1], b[1])


def _xor(a: Interval, b: Interval) -> Interval:
    a, b = _bool(a), _bool(b)
    return _truth(_ne(a, b) == (1, 1), _ne(a, b) == (0, 0))


def _bool(a: Interval) -> Interval:
    return _truth(a[0] > 0 or a[1] < 0, a[0] == a[1] == 0)


def _ne(a: Interval, b: Interval) -> Interval:
    return _not(_eq(a, b))


def _where(condition: Interval, a: Interval, b: Interval) -> Interval:
    truth = _bool(condition)
    if truth == (1, 1):
        return a
    if truth == (0, 0):
        return b
    return min(a[0], b[0]), max(a[1], b[1])


INTERVAL_RULES: Mapping[str, Callable[..., Interval]] = {
    "add": _add,
    "sub": lambda a, b: _add(a, _neg(b)),
    "mul": _corners(lambda x, y: x * y),
    "floordiv": _floordiv,
    "truncdiv": _truncdiv,
    "mod": _mod,
    "neg": _neg,
    "abs": _abs,
    "min": lambda a, b: (min(a[0], b[0]), min(a[1], b[1])),
    "max": lambda a, b: (max(a[0], b[0]), max(a[1], b[1])),
    "le": _le,
    "lt": _lt,
    "ge": lambda a, b: _le(b, a),
    "gt": lambda a, b: _lt(b, a),
    "eq": _eq,
    "ne": _ne,
    "and": _and,
    "or": _or,
    "xor": _xor,
    "not": _not,
    "where": _where,
    "int": lambda a: a if _exact(a) else UNKNOWN,
    "bool": _bool,
}
