"""What a tile function can be on all of a tile, without evaluating it.

Every expression is bounded by an interval [lo, hi] over a box of indices (``intervals.py``);
booleans are 0 and 1. A mask whose interval is [0, 0] keeps nothing on the tile, [1, 1] keeps
everything. Integers are exact; what floating-point arithmetic could round is left unbounded, so
that a classification is never wrong, only sometimes "mixed" where a closer look would say more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from ringfx.ir.tiles.expr import INDICES, Expr
from ringfx.ir.tiles.intervals import EITHER, UNKNOWN, Interval, are_exact
from ringfx.ir.tiles.operators import TILE_OPS

__all__ = ["Box", "Interval", "Kind", "bounds", "classify"]

Kind: TypeAlias = Literal["empty", "full", "mixed"]


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
    op = TILE_OPS.get(head)
    if op is None or op.bounds is None:
        return UNKNOWN
    return op.bounds(*(bounds(e, box, inputs) for e in args))


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
        if not (are_exact((lo, hi)) and lo >= 0 and hi < tensor.shape[dim]):
            return unknown
        window = window.narrow(dim, int(lo), int(hi) - int(lo) + 1)
    if window.dtype == torch.bool:
        window = window.to(torch.uint8)
    low, high = (extreme.item() for extreme in torch.aminmax(window))
    return unknown if math.isnan(low) or math.isnan(high) else (low, high)
