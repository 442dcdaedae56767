"""Values of queries that lie in a grid: its rows and columns as one dimension, that of the queries.

Decomposed relative positions are made of each query, [B, H, high, wide, keys' rows], and read at
``[b, h, q // wide, q % wide, k // keys' columns]``. With the queries in one dimension they are read
at the query's own row, so that each rank makes and has those of its own queries. A token in front
of the grid reads none of them: in its place stands a row of zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch.fx import Node

from ringfx.ir import tiles
from ringfx.ir.tiles import Expr, Q, map_children
from ringfx.ir.tiles.expr import B, H, children, indices_used
from ringfx.ir.tiles.linear_forms import ONE, linear
from ringfx.passes.axes.call import given_input
from ringfx.passes.exprs.emitter import Emitter
from ringfx.passes.masks.cut import Cuts

__all__ = ["merge_rows", "split_heads"]

aten = torch.ops.aten


def merge_rows(
    cuts: Cuts, exprs: Sequence[Expr | None], captured: Sequence[Node], *, q_len: int
) -> tuple[tuple[Expr | None, ...], list[Node]]:
    """The expressions with the queries of each value that they read in one dimension."""
    found = {i: _grid_of(i, exprs, node, q_len) for i, node in enumerate(captured)}
    grids = {i: grid for i, grid in found.items() if grid is not None}

    def rewritten(expr: Expr) -> Expr:
        if expr[0] == "at" and expr[1] in grids:
            read = expr[2:]
            expr = (
                *expr[:2],
                *(Q if place is None else place for place in grids[expr[1]].read(read)),
            )
        return map_children(rewritten, expr)

    values = [cuts.merged(n, grids[i]) if i in grids else n for i, n in enumerate(captured)]
    return tuple(None if e is None else rewritten(e) for e in exprs), values


def split_heads(
    cuts: Cuts, exprs: Sequence[Expr | None], captured: Sequence[Node], *, heads: int
) -> tuple[tuple[Expr | None, ...], list[Node]]:
    """The expressions with each entry of the batch and its heads in two dimensions of what they
    read: of windows in the batch, each rank has the entries of its own."""
    found = {i: _heads_of(i, exprs, node, heads) for i, node in enumerate(captured)}
    apart = {i: x for i, x in found.items() if x is not None}

    def rewritten(expr: Expr) -> Expr:
        if expr[0] == "at" and expr[1] in apart:
            dim, read = apart[expr[1]].dim, expr[2:]
            expr = (*expr[:2], *read[:dim], B, H, *read[dim + 1 :])
        return map_children(rewritten, expr)

    values = [cuts.merged(n, apart[i]) if i in apart else n for i, n in enumerate(captured)]
    return tuple(None if e is None else rewritten(e) for e in exprs), values


@dataclass(frozen=True)
class _Heads:
    """A dimension of a value that is batch and heads."""

    dim: int
    heads: int

    def merged(self, emit: Emitter, node: Node) -> Node:
        shape = [int(n) for n in node.meta["val"].shape]
        shape[self.dim : self.dim + 1] = [shape[self.dim] // self.heads, self.heads]
        return emit.call(aten.reshape.default, node, shape)


def _heads_of(i: int, exprs: Sequence[Expr | None], node: Node, heads: int) -> _Heads | None:
    """Where every read of a computed value has batch and heads in one dimension."""
    both: Expr = ("add", ("mul", B, ("const", heads)), H)
    dims = {
        read[2:].index(both) if both in read[2:] else None
        for read in tiles.reads(*exprs)
        if read[1] == i
    }
    dim = dims.pop() if len(dims) == 1 else None
    if dim is None or heads == 1 or given_input(node) is not None:
        return None
    return _Heads(dim, heads) if int(node.meta["val"].shape[dim]) % heads == 0 else None


@dataclass(frozen=True)
class _Grid:
    """Dimensions of a value that are the queries together, the outermost first."""

    dims: tuple[int, ...]
    before: int
    """Queries in front of the grid's first, and behind its last."""
    after: int

    def read(self, places: Sequence[Expr]) -> list[Expr | None]:
        """Where the merged value is read; None at its queries."""
        kept: list[Expr | None] = [p for d, p in enumerate(places) if d not in self.dims]
        return [*kept[: self._place], None, *kept[self._place :]]

    @property
    def _place(self) -> int:
        """The dimension of the queries: where the first of them is."""
        return min(self.dims)

    def merged(self, emit: Emitter, node: Node) -> Node:
        shape = [int(n) for n in node.meta["val"].shape]
        rest = [d for d in range(len(shape)) if d not in self.dims]
        order = [*rest[: self._place], *self.dims, *rest[self._place :]]
        if order != sorted(order):
            node = emit.call(aten.permute.default, node, order)
        sizes = [shape[d] for d in order]
        sizes[self._place : self._place + len(self.dims)] = [-1]
        node = emit.call(aten.reshape.default, node, sizes)
        if self.before or self.after:
            behind = len(sizes) - 1 - self._place
            node = emit.call(
                aten.constant_pad_nd.default, node, [0, 0] * behind + [self.before, self.after]
            )
        return node


def _grid_of(i: int, exprs: Sequence[Expr | None], node: Node, q_len: int) -> _Grid | None:
    """The grid at which every read of a computed value has its queries."""
    reads = {x for e in exprs if e is not None for x in _guarded(e, i, (0, q_len))}
    if not reads or given_input(node) is not None:
        return None
    shape = tuple(int(n) for n in node.meta["val"].shape)
    grids = {_grid(read, shape, q_len, queries) for read, queries in reads}
    return grids.pop() if len(grids) == 1 else None


Range: TypeAlias = tuple[int, int]
"""Queries from the first to before the second."""


def _guarded(expr: Expr, i: int, queries: Range) -> Iterator[tuple[tuple[Expr, ...], Range]]:
    """The places at which a value is read, and of which queries that is what is chosen."""
    if expr[0] == "at" and expr[1] == i:
        yield expr[2:], queries
    if expr[0] == "where":
        yield from _guarded(expr[1], i, queries)
        yield from _guarded(expr[2], i, _where(expr[1], queries))
        yield from _guarded(expr[3], i, queries)
        return
    for part in children(expr):
        yield from _guarded(part, i, queries)


def _where(condition: Expr, queries: Range) -> Range:
    """The queries for which a condition may hold."""
    first, end = queries
    for term in tiles.terms(condition):
        if term[0] not in ("ge", "gt", "le", "lt"):
            continue
        left, right = term[1:] if term[0] in ("ge", "gt") else term[:0:-1]
        parts = dict(linear(("sub", left, right)))  # at least 0, or more
        least = (1 if term[0] in ("gt", "lt") else 0) - parts.pop(ONE, 0)
        if parts == {Q: 1}:
            first = max(first, least)
        elif parts == {Q: -1}:
            end = min(end, 1 - least)
    return first, end


def _unclamped(base: Expr) -> Expr:
    """``max(base, 0)`` and ``min(base, last)`` are the base where that is inside."""
    while base[0] in ("max", "min") and base[2][0] == "const":
        base = base[1]
    return base


def _grid(places: Sequence[Expr], shape: Sequence[int], q_len: int, queries: Range) -> _Grid | None:
    found: list[tuple[int, int]] = []
    bases: set[Expr] = set()
    for d, place in enumerate(places):
        if "q" in indices_used(place) and "k" not in indices_used(place):
            base, step = _digit(place, shape[d])
            bases.add(base)
            found.append((step, d))
    if len(found) < 2 or len(bases) != 1:
        return None
    step = 1
    for own, d in sorted(found):
        if own != step:
            return None
        step *= shape[d]
    base = bases.pop()
    parts = dict(linear(_unclamped(base)))
    before = -parts.pop(ONE, 0)
    after = q_len - before - step
    if parts != {Q: 1} or before < 0 or after < 0:
        return None
    first, end = queries
    if base != _unclamped(base) and not (before <= first and end <= before + step):
        return None  # another query reads what is nearest
    return _Grid(tuple(d for _, d in sorted(found, reverse=True)), before, after)


def _digit(place: Expr, size: int) -> tuple[Expr, int]:
    """``base // step % size`` as base and step: one digit of a number; step 0 if it is none.

    The outermost digit may be without ``% size``, as no query is beyond it.
    """
    if place[0] == "mod" and place[2] == ("const", size):
        return _divided(place[1])
    base, step = _divided(place)
    if step == 1:
        return place, 0
    if base[0] == "mod" and base[2] == ("const", step * size):
        base = base[1]
    return base, step


def _divided(place: Expr) -> tuple[Expr, int]:
    """``base // a // b`` as base and a * b."""
    step = 1
    while place[0] == "floordiv" and place[2][0] == "const" and type(place[2][1]) is int:
        place, step = place[1], step * place[2][1]
    return place, step
