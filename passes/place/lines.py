"""Token lines: the axes that attention runs over, and their windows, as one line of positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import networkx as nx
import torch
from torch.fx import Node

from ringfx.layout import Layout, LayoutKind
from ringfx.passes.axes import AxisMap
from ringfx.passes.axes.propagate import BoundWindow
from ringfx.passes.axes.space import Dim
from ringfx.passes.values import AttentionSite

__all__ = ["Carried", "Lines", "Member", "Tangle", "TokenLine", "find_lines"]


@dataclass(frozen=True)
class Member:
    """An axis that lies on a token line: its element i is at position ``offset + i``.

    ``logits[:, :-1]`` is such a window: split, it is stored as the logits themselves.
    """

    axis: Dim
    offset: int
    length: int


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

    def carried(self, node: Node, index: int = 0) -> Carried | Tangle | None:
        """How one tensor of a value carries a token line, if it does."""
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
            line=line.index, member=member, dim=d, outer=size(dim[:start]), inner=size(dim[stop:])
        )


def find_lines(
    graph: torch.fx.Graph, axes: AxisMap, sites: Sequence[AttentionSite], world_size: int
) -> Lines:
    """The token axes of all attention, each with its windows and layout.

    A line is laid out zigzag when some attention over it keeps more keys in late rows than in
    early ones; contiguous otherwise.
    """
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
    # An attention operator has one layout: lines that meet in one are laid out alike.
    for together in nx.connected_components(nx.Graph(met)):
        zigzag = any(unbalanced[axis] for axis in together)
        unbalanced |= dict.fromkeys(together, zigzag)
    return _build(axes, unbalanced, world_size)


def _build(axes: AxisMap, unbalanced: Mapping[Dim, bool], world_size: int) -> Lines:
    lines: list[TokenLine] = []
    owner: dict[int, int] = {}
    for axis, zigzag in unbalanced.items():
        if any(atom in owner for atom in axis):
            continue  # part of another line: its values are tangled and stay whole
        kind: LayoutKind = "zigzag" if zigzag and world_size > 1 else "contiguous"
        length = axes.space.size(axis)
        line = TokenLine(
            index=len(lines),
            members=_members(axes, axis, length, set(owner)),
            layout=Layout(kind, length, world_size),
        )
        lines.append(line)
        owner |= {atom: line.index for member in line.members for atom in member.axis}
    return Lines(lines=tuple(lines), axes=axes, _owner=owner)


def _members(axes: AxisMap, axis: Dim, length: int, taken: set[int]) -> tuple[Member, ...]:
    """The line and every window of it, windows of windows included; the largest value decides."""
    members = [Member(axis, 0, length)]
    windows = sorted(axes.windows, key=_weight)
    grown = True
    while grown:
        grown = False
        for window in windows:
            source = axes.space.resolve(window.source)
            result = axes.space.resolve(window.result)
            base = next((m for m in members if m.axis == source), None)
            known = any(set(result) & set(m.axis) for m in members) or set(result) & taken
            if base is None or known or not result:
                continue
            members.append(Member(result, base.offset + window.start, window.length))
            grown = True
    return tuple(members)


def _weight(window: BoundWindow) -> int:
    value = window.node.meta["val"]
    return -value.numel() if isinstance(value, torch.Tensor) else 0
