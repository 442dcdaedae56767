"""Token lines: the axes that attention runs over, and their windows, as one line of positions."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import networkx as nx
import torch
from torch.fx import Node

from ringfx.comm.redistribute import reshard
from ringfx.comm.turn import turn
from ringfx.ir.layout import Layout, LayoutKind
from ringfx.ir.values import Arrival, AttentionSite
from ringfx.passes.axes import AxisMap
from ringfx.passes.axes.call import result_values
from ringfx.passes.axes.routing import Route, find_routes
from ringfx.passes.axes.space import Dim
from ringfx.passes.token_axes.arrivals import Fixed, Laid, arriving, fixed_layouts
from ringfx.passes.token_axes.axis_on_line import AxisOnLine
from ringfx.passes.token_axes.channel_maps import axes_of_channel_maps
from ringfx.passes.token_axes.families import Families, find_families
from ringfx.passes.token_axes.few_queries import has_few_queries
from ringfx.passes.token_axes.grain import Run, blocks_beside, in_blocks
from ringfx.passes.token_axes.row_maps import axes_of_row_maps
from ringfx.passes.token_axes.token_line import Lines, TokenDim, TokenLine
from ringfx.passes.token_axes.windows import can_move
from ringfx.passes.token_axes.without_attention import InputAxis

LARGEST_WASTE = 0.5
"""Share of a line's work that storing shorter streams along it may add."""

__all__ = ["find_lines"]


def find_lines(
    graph: torch.fx.Graph,
    axes: AxisMap,
    sites: Sequence[AttentionSite],
    world_size: int,
    arrivals: Mapping[Node, Arrival] | None = None,
    inputs: Sequence[InputAxis] = (),
    held: Collection[Node] = (),
) -> Lines:
    """The token axes of all attention and of inputs that arrive split, with windows and layout.

    ``inputs``: what are tokens where there is no attention. ``held``: inputs that modules hold.

    A line is laid out as what arrives split on it; else zigzag when some attention over it keeps
    more keys in late rows than in early ones; contiguous otherwise.
    """
    fixed = arriving(axes, arrivals or {})
    nodes = {n.name: n for n in graph.nodes}
    unbalanced: dict[Dim, bool] = {}
    rigid: set[Dim] = set()
    met: list[tuple[Dim, Dim]] = []
    few: list[Dim] = []
    runs: list[Run] = []
    for site in sites:
        q, k = nodes[site.node].args[0], nodes[site.node].args[1]
        assert isinstance(q, Node)
        assert isinstance(k, Node)
        q_axis, k_axis = axes.dims(q)[2], axes.dims(k)[2]
        if has_few_queries(nodes[site.node]) and not blocks_beside(axes, [Run(q, k)]):
            few.append(q_axis)
            unbalanced |= {k_axis: unbalanced.get(k_axis, False)} if k_axis else {}
            rigid |= set() if can_move(site.spec) else {k_axis}
            continue
        for axis in (q_axis, k_axis):
            if axis:
                unbalanced.setdefault(axis, False)
        rigid |= set() if can_move(site.spec) else {q_axis, k_axis}
        if q_axis and k_axis:
            unbalanced[q_axis] |= not site.balanced
            met.append((q_axis, k_axis))
            runs.append(Run(q, k))
    attended = set(unbalanced)
    for given in inputs:
        unbalanced.setdefault(axes.dims(given.node)[given.dim], False)
    summed = [] if inputs else axes_of_channel_maps(graph, axes, held)
    for axis in (*_resharded(graph, axes), *summed):
        unbalanced.setdefault(axis, False)
    for axis in axes_of_row_maps(graph, axes, set(unbalanced)):
        unbalanced.setdefault(axis, False)
    builder = _Builder(
        axes=axes, families=find_families(axes), work=_work(axes), uneven=unbalanced, met=met,
        attended=attended, rigid=rigid, few=set(few) - attended, world_size=world_size,
    )  # fmt: skip
    lines = builder.build(fixed)
    while len(lines.arrived) < len(fixed):  # an input that does not fit gives no line either
        fixed = [f for f in fixed if f.node in lines.arrived]
        lines = builder.build(fixed)
    if world_size > 1:
        lines = in_blocks(lines, runs, unbalanced, rigid, partial(builder.build, fixed))
    return _with_routes(replace(lines, inputs=tuple(inputs)), find_routes(graph, axes))


def _resharded(graph: torch.fx.Graph, axes: AxisMap) -> Iterator[Dim]:
    """Axes between which tokens change their split, or those that they are a part of."""
    families = find_families(axes)
    for node in graph.nodes:
        if node.target is reshard:
            source, dim, *ends = node.args
            places = [] if ends else [(source, dim), (node, dim)]
        elif node.target is turn:
            source, ends, starts = node.args
            places = [(source, ends), (node, starts)]
        else:
            continue
        for value, dim in places:
            axis = axes.dims(value)[dim]
            if axis:
                yield families.widest(axis, axes.space.size)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Builder:
    """What lines are made of."""

    axes: AxisMap
    families: Families
    work: Mapping[Dim, int]
    """Elements of all values that carry an axis."""
    uneven: Mapping[Dim, bool]
    """The axes of lines: whether some attention over them keeps more keys in late rows."""
    met: Sequence[tuple[Dim, Dim]]
    attended: Collection[Dim]
    """Those that some attention runs over."""
    rigid: Collection[Dim]
    """Those whose attention must have a line of its own."""
    few: Collection[Dim]
    """Queries that every rank has all of: a window of them is none that is stored with its line."""
    world_size: int

    def build(self, fixed: Sequence[Fixed], blocks: Mapping[Dim, Dim] | None = None) -> Lines:
        """Lines of the longest axes first; axes that lie within one already are its members.

        ``blocks`` are axes whose line is one of blocks of tokens, and the axis of those blocks;
        or (), of axes that are not to be lines.
        """
        axes, size = self.axes, self.axes.space.size
        grain = {axis: (blocks or {}).get(axis, axis) for axis in self.uneven}
        unbalanced = {grain[a]: False for a in self.uneven} | {f.axis: False for f in fixed}
        unbalanced.pop((), None)  # of those that are not to be lines
        for axis, value in self.uneven.items():
            if grain[axis] == axis[: len(grain[axis])] != ():
                unbalanced[grain[axis]] |= value
        alone = {grain[axis] for axis in self.rigid if axis} - {()}
        used = {grain.get(axis, axis) for axis in (*self.attended, *(f.axis for f in fixed))}
        used -= {()}
        met = [(grain[q], grain[k]) for q, k in self.met]
        claimed: dict[Dim, tuple[AxisOnLine, ...]] = {}
        owned: set[int] = set()
        of_blocks = set((blocks or {}).values())
        order = {a: (a in of_blocks, size(a)) for a in unbalanced}
        for axis in sorted(order, key=order.__getitem__, reverse=True):
            if any(atom in owned for atom in axis):
                continue  # a window of a longer line, or shares an axis with another one
            kept = {o for o in used if o in alone or not _joins(axes, axis, o, self.work)}
            kept = (kept | set(self.few)) - {axis}
            claimed[axis] = _members(axes, self.families, axis, owned, kept)
            owned |= {atom for member in claimed[axis] for atom in member.axis}
        together = _meeting(claimed, met)
        laid, kinds = fixed_layouts(claimed, together, self.attended, fixed)
        zigzag = _zigzag(claimed, unbalanced, together)
        lines: list[TokenLine] = []
        owner: dict[int, int] = {}
        for axis in (a for a in unbalanced if a in claimed):
            wanted: LayoutKind = (
                "zigzag" if axis in zigzag and self.world_size > 1 else "contiguous"
            )
            own = Layout(kinds.get(axis, wanted), size(axis), self.world_size)
            line = laid.get(axis, Laid(layout=own, members=claimed[axis]))
            lines.append(TokenLine(index=len(lines), members=line.members, layout=line.layout))
            owner |= {atom: lines[-1].index for m in line.members for atom in m.axis}
        found = Lines(lines=tuple(lines), axes=axes, _owner=owner)
        return replace(found, arrived=frozenset(f.node for f in fixed if _lies(found, f)))


def _lies(lines: Lines, fixed: Fixed) -> bool:
    """Whether the input is split just as its line would split it."""
    tokens = lines.token_dim(fixed.node)
    return isinstance(tokens, TokenDim) and fixed.arrival == lines.arrival(tokens)


def _with_routes(lines: Lines, routes: Sequence[Route]) -> Lines:
    """Sorted rows as members of the lines whose tokens they are."""
    axes, owner = lines.axes, dict(lines._owner)
    members: dict[int, list[AxisOnLine]] = {}
    kept: list[Route] = []
    for route in routes:
        source, ordered = axes.space.resolve(route.source), axes.space.resolve(route.ordered)
        tokens = lines.in_dim(source, 0) if any(atom in owner for atom in source) else None
        if tokens is None or set(ordered) & set(owner) or set(ordered) & set(source):
            continue
        copies = tokens.outer * tokens.inner
        member = AxisOnLine(ordered, tokens.member.offset, tokens.member.length, copies, True)
        members.setdefault(tokens.line, []).append(member)
        owner |= dict.fromkeys(ordered, tokens.line)
        kept.append(route)
    longer = tuple(
        replace(line, members=(*line.members, *members.get(line.index, ()))) for line in lines.lines
    )
    return replace(lines, lines=longer, _owner=owner, routes=tuple(kept))


def _meeting(
    claimed: Mapping[Dim, Sequence[AxisOnLine]], met: Sequence[tuple[Dim, Dim]]
) -> list[set[Dim]]:
    """Lines that must lie alike: an attention has one layout."""
    line_of = {member.axis: axis for axis, members in claimed.items() for member in members}
    graph = nx.Graph()
    graph.add_nodes_from(claimed)
    graph.add_edges_from((line_of[q], line_of[k]) for q, k in met if q in line_of and k in line_of)
    return list(nx.connected_components(graph))


def _zigzag(
    claimed: Mapping[Dim, Sequence[AxisOnLine]],
    unbalanced: Mapping[Dim, bool],
    together: Sequence[Collection[Dim]],
) -> set[Dim]:
    """Lines to lay out zigzag, if nothing lies otherwise yet."""
    line_of = {member.axis: axis for axis, members in claimed.items() for member in members}
    uneven = {line_of[axis] for axis, value in unbalanced.items() if value and axis in line_of}
    return {axis for lines in together if uneven & set(lines) for axis in lines}


def _work(axes: AxisMap) -> Mapping[Dim, int]:
    """Elements of all values that carry an axis."""
    found: dict[Dim, int] = {}
    for node in axes.values:
        for i, value in enumerate(result_values(node)):
            for dim in set(axes.dims(node, i)):
                found[dim] = found.get(dim, 0) + value.numel()
    return found


def _joins(axes: AxisMap, line: Dim, part: Dim, work: Mapping[Dim, int]) -> bool:
    """Whether tokens that attend by themselves too are better stored as a part of a longer line.

    Stored so, each rank computes with as many of them as the whole line has: that is little for a
    class token in front, and twice the work for two streams of equal length.
    """
    growth = axes.space.size(line) / axes.space.size(part) - 1
    total = work.get(part, 0) + work.get(line, 0)
    return growth * work.get(part, 0) <= LARGEST_WASTE * total


def _members(
    axes: AxisMap, families: Families, axis: Dim, taken: set[int], kept: set[Dim]
) -> tuple[AxisOnLine, ...]:
    """The line and every axis that lies within it, the largest values' first.

    A window of no tokens is no member: there is nothing of it to spread.
    """
    length = axes.space.size(axis)
    members = [AxisOnLine(axis, 0, length)]
    used = set(axis) | taken
    for other, offset in families.relatives(axis):
        size = axes.space.size(other)
        inside = offset >= 0 and 0 < size <= length - offset
        if not inside or other in kept or used & set(other) or len(set(other)) != len(other):
            continue
        members.append(AxisOnLine(other, offset, size))
        used |= set(other)
    return tuple(members)
