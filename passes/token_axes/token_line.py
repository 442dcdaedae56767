"""A line of token positions that is split over the ranks, and how tensors carry it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from math import log

from torch.fx import Node

from ringfx.ir.layout import Layout
from ringfx.ir.values import Arrival
from ringfx.passes.axes import AxisMap
from ringfx.passes.axes.routing import Route
from ringfx.passes.axes.space import Dim
from ringfx.passes.token_axes.axis_on_line import Member

__all__ = ["Carried", "Lines", "Tangle", "TokenLine"]


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

    def attended(self, inner: int) -> int:
        """Length, in elements, of the line as attention sees it: ranks hold equal runs of it.

        Where a token of the line is a block of ``inner`` tokens of the attention, they may not be
        split as so many tokens alone would be, and padding is a part of the line.
        """
        length = self.length * inner
        alone = Layout(self.layout.kind, length, self.layout.world_size)
        same = alone.chunk_length == self.layout.chunk_length * inner
        return length if same else self.layout.padded_length * inner

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

    def carries_one(self, node: Node) -> bool:
        """Whether the value carries one line of tokens, so that it can be split."""
        return isinstance(self.carried(node), Carried)

    def power(self, node: Node) -> int:
        """The power of the number of tokens that the size of a value grows with.

        Of tokens that are cut into rows and columns each is half of one; a window of a few of them
        is none.
        """
        dims = self.axes.dims(node) if self.axes.values.get(node) else ()
        owned = [axis for dim in dims for axis in dim if axis in self._owner]
        size = self.axes.space.size
        lengths = [self.lines[self._owner[axis]].length for axis in owned]
        pairs = zip(owned, lengths, strict=True)
        return round(sum(log(size((axis,)), length) for axis, length in pairs if length > 1))

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
