"""Matrices of queries and keys, cut to the queries and keys that an attention reads.

A mask kept as ``[1, 1, N, N]`` of which the first S rows are read, a bias read at ``[q + 2, k]``, a
mask that is read both as it stands and transposed: each becomes a value whose rows are the
attention's own queries, which is what can be split with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch.fx import Graph, Node

from ringfx.ir import tiles
from ringfx.ir.tiles import Expr, K, Q, const, map_children
from ringfx.ir.tiles.linear_forms import ONE, linear
from ringfx.passes.capture.gradients import needs_grad
from ringfx.passes.exprs.emitter import Emitter

__all__ = ["Cuts", "Rows", "cut_to_rows"]

aten = torch.ops.aten
FIRST: Expr = const(0)


@dataclass(frozen=True)
class _Run:
    """A dimension that is read at ``index + start``, over ``length`` of its elements."""

    index: Expr
    start: int
    length: int


Cut: TypeAlias = tuple[_Run | None, ...]
"""What is read of each dimension; None for one that is left as it is."""


class Rows(Protocol):
    """How the queries of a value, in several dimensions, become one."""

    def merged(self, emit: Emitter, node: Node) -> Node: ...


class Cuts:
    """What was cut out of the values of one program: once for all attentions that read it."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._made: dict[tuple[Node, Cut | Rows], Node] = {}

    def of(self, node: Node, cut: Cut) -> Node:
        if (node, cut) not in self._made:
            self._made[node, cut] = self._make(node, cut)
        return self._made[node, cut]

    def merged(self, node: Node, rows: Rows) -> Node:
        """The value with its queries in one dimension, as many of them as the attention has."""
        if (node, rows) not in self._made:
            emit = Emitter(self._graph, self._after(node))
            self._made[node, rows] = rows.merged(emit, node)
        return self._made[node, rows]

    def _make(self, node: Node, cut: Cut) -> Node:
        for dim, run in enumerate(cut):
            if run is not None and run.length != node.meta["val"].shape[dim]:
                emit = Emitter(self._graph, self._after(node))
                end = run.start + run.length
                node = emit.call(aten.slice.Tensor, node, dim, run.start, end)
        return node

    def _after(self, node: Node) -> Node:
        inputs = self._graph.find_nodes(op="placeholder")
        return (inputs[-1] if node.op == "placeholder" else node).next


def cut_to_rows(
    cuts: Cuts,
    exprs: Sequence[Expr | None],
    captured: Sequence[Node],
    *,
    q_len: int,
    kv_len: int,
) -> tuple[tuple[Expr | None, ...], list[Node]]:
    """The expressions with every matrix that they read row by row cut to those rows."""
    return _Cutter(cuts, captured, tiles.matrices(*exprs), {Q: q_len, K: kv_len}).run(exprs)


class _Cutter:
    def __init__(
        self,
        cuts: Cuts,
        captured: Sequence[Node],
        matrices: Sequence[int],
        lengths: Mapping[Expr, int],
    ) -> None:
        self._cuts = cuts
        self._captured = captured
        self._matrices = matrices
        self._lengths = lengths
        self._places: dict[tuple[int, Cut | None], int] = {}
        self._found: list[Node] = []

    def run(self, exprs: Sequence[Expr | None]) -> tuple[tuple[Expr | None, ...], list[Node]]:
        return tuple(None if e is None else self._rewritten(e) for e in exprs), self._found

    def _rewritten(self, expr: Expr) -> Expr:
        if expr[0] == "at":
            return self._read(expr[1], expr[2:])
        return map_children(self._rewritten, expr)

    def _read(self, i: int, places: Sequence[Expr]) -> Expr:
        cut = self._cut(i, places) if i in self._matrices else None
        number = self._number(i, cut)
        runs = cut or (None,) * len(places)
        read = (
            self._rewritten(place) if run is None else run.index
            for run, place in zip(runs, places, strict=True)
        )
        return ("at", number, *read)

    def _number(self, i: int, cut: Cut | None) -> int:
        if (i, cut) not in self._places:
            node = self._captured[i]
            self._places[i, cut] = len(self._found)
            self._found.append(node if cut is None else self._cuts.of(node, cut))
        return self._places[i, cut]

    def _cut(self, i: int, places: Sequence[Expr]) -> Cut | None:
        """None where there is nothing to gain: its rows are not the queries' own."""
        runs = tuple(self._run(self._captured[i], d, place) for d, place in enumerate(places))
        indices = [run.index for run in runs if run is not None]
        return runs if indices.count(Q) == 1 or FIRST in indices else None

    def _run(self, node: Node, dim: int, place: Expr) -> _Run | None:
        value: torch.Tensor = node.meta["val"]
        size = int(value.shape[dim])
        if size > 1 and value.stride(dim) == 0 and not needs_grad(node):  # equal copies
            return _Run(FIRST, 0, 1)
        for index, length in self._lengths.items():
            start = _offset(place, index)
            if start is not None and 0 <= start <= size - length:
                return _Run(index, start, length)
        return None


def _offset(place: Expr, index: Expr) -> int | None:
    """c of ``index + c``, if that is what a place is."""
    parts = dict(linear(place))
    start = parts.pop(ONE, 0)
    return start if parts == {index: 1} else None
