"""A line of token positions that is sharded over the ranks, and which dimension holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import log
from typing import TypeAlias

from torch.fx import Node

from ringfx.ir.layout import Layout
from ringfx.ir.values import Arrival
from ringfx.passes.axes import AxisMap
from ringfx.passes.axes.routing import Route
from ringfx.passes.axes.space import Dim
from ringfx.passes.token_axes.axis_on_line import AxisOnLine
from ringfx.passes.token_axes.without_attention import InputAxis

__all__ = ["Lines", "MaybeTokenDim", "NotShardable", "TokenDim", "TokenLine"]


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenLine:
    """One line of token positions that is sharded over the ranks."""

    index: int
    members: tuple[AxisOnLine, ...]
    """The line itself first, then its windows."""
    layout: Layout

    @property
    def length(self) -> int:
        return self.layout.length

    def member(self, axis: Dim) -> AxisOnLine | None:
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

    def has_padding(self, member: AxisOnLine) -> bool:
        """Whether some local tokens are not elements of the member."""
        return self.layout.is_padded or member.length != self.length


@dataclass(frozen=True, kw_only=True)
class TokenDim:
    """The dimension of a tensor that holds a line's tokens: ``dim`` is [outer, tokens, inner]."""

    line: int
    member: AxisOnLine
    dim: int
    outer: int
    inner: int


@dataclass(frozen=True)
class NotShardable:
    """A tensor that holds tokens in a way that no rank can have a part of.

    They are two of its dimensions, or regrouped so that no run of tokens stays together.
    """


MaybeTokenDim: TypeAlias = TokenDim | NotShardable | None
"""How a tensor holds tokens; None: not at all."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Lines:
    """All token lines of a program, and which dimension of each value holds them."""

    lines: tuple[TokenLine, ...]
    axes: AxisMap
    _owner: Mapping[int, int]
    routes: tuple[Route, ...] = ()
    arrived: frozenset[Node] = frozenset()
    """Inputs that are sharded already, as the line that they are on."""
    inputs: tuple[InputAxis, ...] = ()
    """What is taken for tokens, where there is no attention."""
    _known: dict[tuple[Node, int], MaybeTokenDim] = field(
        default_factory=dict, init=False, repr=False
    )

    def token_dim(self, node: Node, index: int = 0) -> MaybeTokenDim:
        """How one tensor of a value holds tokens."""
        key = (node, index)
        if key not in self._known:
            self._known[key] = self._find_token_dim(node, index)
        return self._known[key]

    def dims_with_tokens(self, node: Node, index: int = 0) -> tuple[int, ...]:
        """The dimensions of a value that hold tokens of any line, however they do."""
        dims = self.axes.dims(node, index) if node in self.axes.values else ()
        return tuple(d for d, dim in enumerate(dims) if any(axis in self._owner for axis in dim))

    def carries_one(self, node: Node) -> bool:
        """Whether one dimension of the value holds tokens, so that it can be sharded."""
        return isinstance(self.token_dim(node), TokenDim)

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

    def arrival(self, tokens: TokenDim) -> Arrival:
        """How such a tensor is sharded, for programs that follow."""
        return Arrival(
            layout=self.lines[tokens.line].layout,
            offset=tokens.member.offset,
            length=tokens.member.length,
            dim=tokens.dim,
            outer=tokens.outer,
            inner=tokens.inner,
        )

    def _find_token_dim(self, node: Node, index: int) -> MaybeTokenDim:
        if node not in self.axes.values:
            return None
        found: list[TokenDim] = []
        for d, dim in enumerate(self.axes.dims(node, index)):
            if not any(axis in self._owner for axis in dim):
                continue
            place = self.in_dim(dim, d)
            if place is None:
                return NotShardable()
            found.append(place)
        if len(found) > 1:
            return NotShardable()
        return found[0] if found else None

    def in_dim(self, dim: Dim, d: int) -> TokenDim | None:
        """How tokens lie in dimension ``d``, which is made of these axes."""
        owned = [i for i, axis in enumerate(dim) if axis in self._owner]
        start, stop = owned[0], owned[-1] + 1
        line = self.lines[self._owner[dim[start]]]
        member = line.member(dim[start:stop])
        if member is None:
            return None
        size = self.axes.space.size
        return TokenDim(
            line=line.index,
            member=member,
            dim=d,
            outer=size(dim[:start]) * member.copies,
            inner=size(dim[stop:]),
        )
