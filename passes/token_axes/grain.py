"""Which axes are lines, and their grain: single tokens, or blocks of them.

A tensor is split along one line. Two choices decide how much of a program is.

**Blocks.** Where tokens are viewed as ``(blocks, tokens of a block)`` a split by single tokens
ends: no part of such a tensor is a run of tokens. A split into runs of whole blocks goes on. So
where tokens are cut into pieces each first part of them is tried as the axis of the line, and what
ranks save most by is taken.

**One axis of several.** Attention along the rows of a grid and then along its columns gives two
axes that every tensor has. One of them is the line, and attention along the other is local: each
rank attends to its own rows. So each axis is tried alone, without those that it meets. Attention
among the tokens of a window alone has blocks beside it, the windows, which may be the line as well.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TypeAlias

import networkx as nx
from torch.fx import Node

from ringfx.passes.axes import AxisMap
from ringfx.passes.axes.call import result_values
from ringfx.passes.axes.space import Dim
from ringfx.passes.token_axes.token_line import Lines, NotShardable, TokenDim

__all__ = ["Run", "blocks_beside", "in_blocks"]

Blocks: TypeAlias = Mapping[Dim, Dim]
"""Axes of tokens, and the first part of each that is to be the axis of its line; (): none is."""
Value: TypeAlias = tuple[Node, int]
"""One tensor of a value."""


ATTENTION, SENT = 4, 2
"""How often the queries and keys of an attention count, against a number that is stored: it holds
and computes more than they are, and sends them if ranks share its tokens."""


@dataclass(frozen=True, eq=False)
class Run:
    """An attention's queries and keys."""

    queries: Node
    keys: Node

    @property
    def size(self) -> int:
        return sum(int(x.meta["val"].numel()) for x in (self.queries, self.keys))


@dataclass(frozen=True, order=True)
class _Gain:
    """What a choice of lines is worth; the first that differs decides."""

    saved: int
    """Numbers that a rank need not have, or work with, less those that it sends for it."""
    length: int
    """Of the shortest line that attention runs over: it leaves ranks little to do at a time."""


def in_blocks(
    lines: Lines,
    runs: Sequence[Run],
    axes: Collection[Dim],
    rigid: Collection[Dim],
    build: Callable[[Blocks], Lines],
) -> Lines:
    """The lines of ``build`` under which most is split.

    Axes that no tensor has together are decided apart, as the layers of a model mostly are.

    Parameters
    ----------
    axes
        Those that would be lines, token by token.
    rigid
        Axes whose attention has no mask for padding between the ranks' runs.
    """
    chosen: dict[Dim, Dim] = {}
    beside = blocks_beside(lines.axes, runs)
    if len(axes) < 2 and not beside and not any(len(axis) > 1 for axis in axes):
        return lines
    for group in _groups(lines, axes, beside):
        best, improved = _gain(lines, runs, group), True
        while improved:
            tried = [
                (build(blocks), blocks)
                for axis in group.axes
                if axis not in chosen
                for option in group.options(
                    axis, cut=_is_cut(lines, group.owned[axis], group.values)
                )
                if (blocks := {**chosen, **option})
            ]
            fitting = [
                (_gain(built, runs, group), built, blocks)
                for built, blocks in tried
                if built.arrived == lines.arrived and _fits(built, blocks, rigid)
            ]
            most = max(fitting, key=lambda option: option[0], default=(best, lines, chosen))
            improved = most[0] > best
            if improved:
                best, lines, chosen = most
    return lines


@dataclass(frozen=True, eq=False, kw_only=True)
class _Group:
    """Axes that tensors have together, and those tensors."""

    axes: Sequence[Dim]
    values: Sequence[Value]
    owned: Mapping[Dim, Collection[int]]
    """The atoms of each, and of what is stored along it alone."""
    meets: Mapping[Dim, Collection[Dim]]
    """Axes that some tensor has beside each."""
    beside: Mapping[Dim, Collection[Dim]]
    """Blocks of tokens that an attention has as its batch."""

    def options(self, axis: Dim, *, cut: bool) -> Iterator[dict[Dim, Dim]]:
        """The blocks beside the axis in its place; where some tensor cannot be split as it is, a
        first part of it as blocks, or it alone of those that it meets."""
        for blocks in self.beside.get(axis, ()):
            others = {x: _shared(x, blocks) for x in self.meets[axis]}
            yield others | {x: blocks for x, found in self.beside.items() if blocks in found}
        if not cut:
            return
        alone: dict[Dim, Dim] = dict.fromkeys(self.meets[axis], ())
        for stop in range(1, len(axis)):
            yield {axis: axis[:stop]} | self._without(axis, set(axis[stop:]))
        for stop in range(1, len(axis) + 1) if alone else ():
            yield {**alone, axis: axis[:stop]}

    def _without(self, axis: Dim, rest: Collection[int]) -> dict[Dim, Dim]:
        """Of axes that share the rest what is before it; of an axis of nothing but blocks' tokens
        there is nothing."""
        others = {other: _before(other, rest) for other in self.axes if other != axis}
        return {other: part for other, part in others.items() if part != other}


def _groups(
    found_lines: Lines, lines: Collection[Dim], beside: Mapping[Dim, Collection[Dim]]
) -> Iterator[_Group]:
    """Axes that tensors have together, of which there are several, or parts of one."""
    axes, owned = found_lines.axes, _owned(found_lines, lines)
    owners: dict[int, list[Dim]] = {}
    for axis in lines:
        for atom in owned[axis]:
            owners.setdefault(atom, []).append(axis)
    graph = nx.Graph()
    graph.add_nodes_from(lines)
    found: list[tuple[Dim, Value]] = []
    for node in axes.values:
        for i in range(len(result_values(node))):
            atoms = (atom for dim in axes.dims(node, i) for atom in dim)
            met = list(dict.fromkeys(axis for atom in atoms for axis in owners.get(atom, ())))
            graph.add_edges_from(combinations(met, 2))
            found += [(axis, (node, i)) for axis in met[:1]]
    for group in nx.connected_components(graph):
        if len(group) > 1 or any(len(axis) > 1 or axis in beside for axis in group):
            yield _Group(
                axes=[a for a in lines if a in group],
                values=[v for axis, v in found if axis in group],
                owned=owned,
                meets={a: [other for other in lines if graph.has_edge(a, other)] for a in group},
                beside=beside,
            )


def _owned(lines: Lines, axes: Collection[Dim]) -> Mapping[Dim, Collection[int]]:
    """For each axis its atoms, and those of its windows that no other axis has: frames behind a
    class token are tokens beside the places of each frame, as frames alone are."""
    own = {axis: dict.fromkeys(axis) for axis in axes}
    known = {atom for axis in axes for atom in axis}
    for line in lines.lines:
        first, *windows = line.members
        if first.axis in own:
            own[first.axis] |= {x: None for m in windows for x in m.axis if x not in known}
    return own


def _shared(axis: Dim, blocks: Dim) -> Dim:
    """The blocks, if they are what the axis begins with."""
    return blocks if axis[: len(blocks)] == blocks else ()


def _before(axis: Dim, rest: Collection[int]) -> Dim:
    """What comes before the rest; all of it if it has none of the rest."""
    first = next((i for i, atom in enumerate(axis) if atom in rest), len(axis))
    return axis[:first]


def blocks_beside(axes: AxisMap, runs: Sequence[Run]) -> Mapping[Dim, Collection[Dim]]:
    """For each attended axis the parts of a batch that were cut off the same tokens as it was."""
    cut_from = axes.space.ancestors()
    found: dict[Dim, dict[Dim, None]] = {}
    for run in runs:
        batch, heads, queries, _ = axes.dims(run.queries)  # of one head, windows may stand there
        sources = {x for atom in queries for x in cut_from.get(atom, ())}
        for atom in (*batch, *heads):
            if sources & cut_from.get(atom, set()):
                for axis in (queries, axes.dims(run.keys)[2]):
                    found.setdefault(axis, {})[(atom,)] = None
    return found


def _is_cut(lines: Lines, owned: Collection[int], values: Sequence[Value]) -> bool:
    """Whether some tensor has tokens of an axis in a way that cannot be split."""
    atoms = set(owned)
    return any(
        isinstance(lines.token_dim(*value), NotShardable)
        and any(atoms & set(dim) for dim in lines.axes.dims(*value))
        for value in values
    )


def _fits(lines: Lines, blocks: Blocks, rigid: Collection[Dim]) -> bool:
    """Whether no attention would need a mask for padding that it cannot have."""
    padded = {m.axis for line in lines.lines if line.layout.is_padded for m in line.members}
    return not any(
        axis in rigid and block in padded and axis[: len(block)] == block
        for axis, block in blocks.items()
    )


def _gain(lines: Lines, runs: Sequence[Run], group: _Group) -> _Gain:
    saved = sum(_saved(lines, *value) for value in group.values)
    length = 0
    here = {node for node, _ in group.values}
    for run in runs:
        tokens, keys = lines.token_dim(run.queries), lines.token_dim(run.keys)
        if run.queries not in here or not isinstance(tokens, TokenDim):
            continue
        along = isinstance(keys, TokenDim) and (tokens.dim, keys.dim) == (2, 2)
        if along and tokens.outer == 1:
            saved -= SENT * run.size
            held = lines.lines[tokens.line].length
            length = min(length or held, held)
        elif tokens.dim > 1 or tokens != keys:
            saved -= ATTENTION * run.size  # it cannot be split: gathered, and computed whole
            continue
        for operand in (run.queries, run.keys):
            saved += ATTENTION * _saved(lines, operand, 0)
    return _Gain(saved, length)


def _saved(lines: Lines, node: Node, i: int) -> int:
    """Elements that a rank need not have because a value can be split."""
    tokens = lines.token_dim(node, i)
    if not isinstance(tokens, TokenDim):
        return 0
    held = lines.lines[tokens.line].layout.local_length
    length = max(tokens.member.length, 1)
    return result_values(node)[i].numel() * max(length - held, 0) // length
