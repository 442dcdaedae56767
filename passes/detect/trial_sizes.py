"""Sizes of a proof's axes, and tile functions as they read over axes of these sizes.

Every axis gets a size of its own, all different, so that no coincidence of sizes hides a swap; of
very many some get the same, as a proof is to be small: a swap of these shows in the values. A mask
of images reads ``q // 14``, the row of a token in an image 14 wide: where the proof gives such a
row 5 tokens, it reads ``q // 5``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ringfx.ir.tiles import Expr, const, map_children
from ringfx.passes.axes.space import Dim
from ringfx.passes.detect.candidate import Candidate, Region

__all__ = ["Resized", "small_sizes"]

DIVISIONS = frozenset({"floordiv", "truncdiv", "mod"})
"""Of positions, which are not negative."""
SIZES = (2, 3, 4, 5, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17)
LARGEST = 2**22
"""Elements that a value of a proof has at most, as far as axes of two or three elements allow."""


def small_sizes(candidate: Candidate, region: Region) -> dict[int, int]:
    q, k = candidate.q[0].arrangement.wanted, candidate.k[0].arrangement.wanted
    scores = [*q[0], *q[1], *q[2], *k[2]]
    order = [*scores, *q[3], *candidate.v.arrangement.wanted[3]]
    every = [
        *(dims for values in region.dims.values() for dims in values),
        *(dims for pair in region.factors for f in pair for dims in f.dims.values()),
        *candidate.entering.values(),
    ]
    atoms = list(dict.fromkeys([*order, *(a for dims in every for dim in dims for a in dim)]))
    values = {frozenset(a for dim in dims for a in dim) for dims in every} | {frozenset(scores)}
    for different in range(len(SIZES), 1, -1):
        sizes = {a: SIZES[i % different] for i, a in enumerate(atoms)}
        if max(math.prod(sizes[a] for a in value) for value in values) <= LARGEST:
            break
    keys = math.prod(sizes[a] for a in k[2])
    return sizes | dict.fromkeys(region.joined, keys + 1)


class Resized:
    """Tile functions of a candidate's positions, with the sizes of a proof."""

    def __init__(self, candidate: Candidate, sizes: Mapping[int, int]) -> None:
        q, k = candidate.q[0].arrangement.wanted, candidate.k[0].arrangement.wanted
        dims = {"b": q[0], "h": q[1], "q": q[2], "k": k[2]}
        self._runs = {
            index: dict(zip(_runs(candidate.sizes, dim), _runs(sizes, dim), strict=True))
            for index, dim in dims.items()
        }

    def __call__(self, expr: Expr) -> Expr:
        """The expression where a number of tokens that some axes have is that of the proof."""
        return self._moved(expr)[0]

    def _moved(self, expr: Expr) -> tuple[Expr, str, int, int]:
        """The expression; of a part of one index, which, and the run that one step of it is, in
        the program and in the proof."""
        if expr[0] in self._runs:
            return expr, expr[0], 1, 1
        if expr[0] in DIVISIONS and expr[2][0] == "const":
            part, index, step, small = self._moved(expr[1])
            run = step * expr[2][1]
            found = self._runs.get(index, {}).get(run)
            if found is not None and found % small == 0:
                moved = (expr[0], part, const(found // small))
                return moved, index, *((step, small) if expr[0] == "mod" else (run, found))
        return map_children(self, expr), "", 1, 1


def _runs(sizes: Mapping[int, int], dim: Dim) -> Sequence[int]:
    """How many elements the axes of a dimension have from each one on."""
    return [math.prod(sizes[a] for a in dim[i:]) for i in range(len(dim))]
