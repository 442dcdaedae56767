"""Token lines: the axes that attention runs over, and their windows, as one line of positions."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

import networkx as nx
import torch
from torch.fx import Node

from ringfx.layout import Layout, LayoutKind
from ringfx.passes.axes import AxisMap
from ringfx.passes.axes.call import result_values
from ringfx.passes.axes.routing import Route, find_routes
from ringfx.passes.axes.space import Dim
from ringfx.passes.place.arrivals import Fixed, Laid, arriving, fixed_layouts
from ringfx.passes.place.families import Families, find_families
from ringfx.passes.place.member import Member
from ringfx.passes.values import Arrival, AttentionSite

LARGEST_WASTE = 0.5
"""Share of a line's work that storing shorter streams along it may add."""

__all__ = ["Carried", "Lines", "Tangle", "TokenLine", "find_lines"]


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenLine:
    """One line of token positions that is split over the ranks."""

    index: int
    members: tuple[Member, ...]
    """The line itself first, then its windows."""
    layout: Layout

    @property
    def length(self) -> int:
        return self.layout.length

    def member(self, axis: Dim) -> Member | None:
        return next((m for m in self.members if m.axis == axis), None)

    def has_padding(self, member: Member) -> bool:
        """Whether some local tokens are not elements of the member."""
        return self.layout.is_padded or member.length != self.length


@dataclass(frozen=True, kw_only=True)
class Carried:
    """Where a tensor carries a token line: dimension ``dim`` is [outer, tokens, inner]."""

    line: int
    member: Member
    dim: int
    outer: int
    inner: int


class Tangle(Enum):
    """A tensor that carries token axes in a way that cannot be split."""

    TANGLED = "tangled"


@dataclass(frozen=True, eq=False, kw_only=True)
class Lines:
    """All token lines of a program, and where each value carries them."""

    lines: tuple[TokenLine, ...]
    axes: AxisMap
    _owner: Mapping[int, int]
    routes: tuple[Route, ...] = ()
    arrived: frozenset[Node] = frozenset()
    """Inputs that are split already, as the line that they are on."""
    _known: dict[tuple[Node, int], Carried | Tangle | None] = field(
        default_factory=dict, init=False, repr=False
    )

    def carried(self, node: Node, index: int = 0) -> Carried | Tangle | None:
        """How one tensor of a value carries a token line, if it does."""
        key = (node, index)
        if key not in self._known:
            self._known[key] = self._carried(node, index)
        return self._known[key]

    def token_dims(self, node: Node) -> tuple[int, ...]:
        """The dimensions of a value that hold tokens of any line, however they do."""
        dims = self.axes.dims(node) if node in self.axes.values else ()
        return tuple(d for d, dim in enumerate(dims) if any(axis in self._owner for axis in dim))

    def arrival(self, carried: Carried) -> Arrival:
        """How such a tensor is split, as it is told outside of this program."""
        return Arrival(
            layout=self.lines[carried.line].layout,
            offset=carried.member.offset,
            length=carried.member.length,
            dim=carried.dim,
            outer=carried.outer,
            inner=carried.inner,
        )

    def _carried(self, node: Node, index: int) -> Carried | Tangle | None:
        if node not in self.axes.values:
            return None
        found: list[Carried] = []
        for d, dim in enumerate(self.axes.dims(node, index)):
            if not any(axis in self._owner for axis in dim):
                continue
            place = self._find(dim, d)
            if place is None:
                return Tangle.TANGLED
            found.append(place)
        if len(found) > 1:
            return Tangle.TANGLED
        return found[0] if found else None

    def _find(self, dim: Dim, d: int) -> Carried | None:
        owned = [i for i, axis in enumerate(dim) if axis in self._owner]
        start, stop = owned[0], owned[-1] + 1
        line = self.lines[self._owner[dim[start]]]
        member = line.member(dim[start:stop])
        if member is None:
            return None
        size = self.axes.space.size
        return Carried(
            line=line.index,
            member=member,
            dim=d,
            outer=size(dim[:start]) * member.copies,
            inner=size(dim[stop:]),
        )


def find_lines(
    graph: torch.fx.Graph,
    axes: AxisMap,
    sites: Sequence[AttentionSite],
    world_size: int,
    arrivals: Mapping[Node, Arrival] | None = None,
) -> Lines:
    """The token axes of all attention and of inputs that arrive split, with windows and layout.

    A line is laid out as what arrives split on it; else zigzag when some attention over it keeps
    more keys in late rows than in early ones; contiguous otherwise.
    """
    fixed = arriving(axes, arrivals or {})
    nodes = {n.name: n for n in graph.nodes}
    unbalanced: dict[Dim, bool] = {}
    met: list[tuple[Dim, Dim]] = []
    for site in sites:
        q, k = nodes[site.node].args[0], nodes[site.node].args[1]
        assert isinstance(q, Node)
        assert isinstance(k, Node)
        for operand in (q, k):
            axis = axes.dims(operand)[2]
            if axis:
                unbalanced.setdefault(axis, False)
        q_axis, k_axis = axes.dims(q)[2], axes.dims(k)[2]
        if q_axis and k_axis:
            unbalanced[q_axis] |= not site.balanced
            met.append((q_axis, k_axis))
    lines = _build(axes, unbalanced, met, world_size, fixed)
    while len(lines.arrived) < len(fixed):  # an input that does not fit gives no line either
        fixed = [f for f in fixed if f.node in lines.arrived]
        lines = _build(axes, unbalanced, met, world_size, fixed)
    return _with_routes(lines, find_routes(graph, axes))


def _build(
    axes: AxisMap,
    attended: Mapping[Dim, bool],
    met: Sequence[tuple[Dim, Dim]],
    world_size: int,
    fixed: Sequence[Fixed],
) -> Lines:
    """Lines of the longest axes first; axes that lie within one already are its members."""
    families = find_families(axes)
    unbalanced = {**attended, **{f.axis: False for f in fixed if f.axis not in attended}}
    work = _work(axes)
    claimed: dict[Dim, tuple[Member, ...]] = {}
    owned: set[int] = set()
    for axis in sorted(unbalanced, key=axes.space.size, reverse=True):
        if any(atom in owned for atom in axis):
            continue  # a window of a longer line, or tangled with another one
        kept = {o for o in unbalanced if o != axis and not _joins(axes, axis, o, work)}
        claimed[axis] = _members(axes, families, axis, owned, kept)
        owned |= {atom for member in claimed[axis] for atom in member.axis}
    together = _meeting(claimed, met)
    laid, kinds = fixed_layouts(claimed, together, attended, fixed)
    zigzag = _zigzag(claimed, unbalanced, together)
    lines: list[TokenLine] = []
    owner: dict[int, int] = {}
    for axis in (a for a in unbalanced if a in claimed):
        wanted: LayoutKind = "zigzag" if axis in zigzag and world_size > 1 else "contiguous"
        own = Layout(kinds.get(axis, wanted), axes.space.size(axis), world_size)
        line = laid.get(axis, Laid(layout=own, members=claimed[axis]))
        lines.append(TokenLine(index=len(lines), members=line.members, layout=line.layout))
        owner |= {atom: lines[-1].index for m in line.members for atom in m.axis}
    found = Lines(lines=tuple(lines), axes=axes, _owner=owner)
    return replace(found, arrived=frozenset(f.node for f in fixed if _lies(found, f)))


def _lies(lines: Lines, fixed: Fixed) -> bool:
    """Whether the input is split just as its line would split it."""
    carried = lines.carried(fixed.node)
    return isinstance(carried, Carried) and fixed.arrival == lines.arrival(carried)


def _with_routes(lines: Lines, routes: Sequence[Route]) -> Lines:
    """Sorted rows as members of the lines whose tokens they are."""
    axes, owner = lines.axes, dict(lines._owner)
    members: dict[int, list[Member]] = {}
    kept: list[Route] = []
    for route in routes:
        source, ordered = axes.space.resolve(route.source), axes.space.resolve(route.ordered)
        tokens = lines._find(source, 0) if any(atom in owner for atom in source) else None
        if tokens is None or set(ordered) & set(owner) or set(ordered) & set(source):
            continue
        copies = tokens.outer * tokens.inner
        member = Member(ordered, tokens.member.offset, tokens.member.length, copies, True)
        members.setdefault(tokens.line, []).append(member)
        owner |= dict.fromkeys(ordered, tokens.line)
        kept.append(route)
    longer = tuple(
        replace(line, members=(*line.members, *members.get(line.index, ()))) for line in lines.lines
    )
    return replace(lines, lines=longer, _owner=owner, routes=tuple(kept))


def _meeting(
    claimed: Mapping[Dim, Sequence[Member]], met: Sequence[tuple[Dim, Dim]]
) -> list[set[Dim]]:
    """Lines that must lie alike: an attention has one layout."""
    line_of = {member.axis: axis for axis, members in claimed.items() for member in members}
    graph = nx.Graph()
    graph.add_nodes_from(claimed)
    graph.add_edges_from((line_of[q], line_of[k]) for q, k in met if q in line_of and k in line_of)
    return list(nx.connected_components(graph))


def _zigzag(
    claimed: Mapping[Dim, Sequence[Member]],
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
) -> tuple[Member, ...]:
    """The line and every axis that lies within it, the largest values' first.

    A window of no tokens is no member: there is nothing of it to spread.
    """
    length = axes.space.size(axis)
    members = [Member(axis, 0, length)]
    used = set(axis) | taken
    for other, offset in families.relatives(axis):
        size = axes.space.size(other)
        inside = offset >= 0 and 0 < size <= length - offset
        if not inside or other in kept or used & set(other) or len(set(other)) != len(other):
            continue
        members.append(Member(other, offset, size))
        used |= set(other)
    return tuple(members)
