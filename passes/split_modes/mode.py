"""The base of all ways to split a call, and the call as they see it when they recognise one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Self, TypeAlias, TypeGuard

from torch.fx import Node

from ringfx.passes.axes.call import Call, OpAxes, result_values
from ringfx.passes.axes.propagate import NamedOp
from ringfx.passes.split_modes.local_call import LocalCall
from ringfx.passes.split_modes.placement import Placement
from ringfx.passes.token_axes.token_line import Lines, MaybeTokenDim, NotShardable, TokenDim

__all__ = ["CallOnLine", "CannotSplit", "Match", "SplitMode", "is_alone_on"]


@dataclass(frozen=True, kw_only=True)
class SplitMode:
    """One way to run a call on sharded tokens of one line: as it stands, on each rank's part."""

    operands: tuple[Placement, ...] = ()
    """In which placement each tensor operand is taken."""

    is_partial_sum: ClassVar[bool] = False
    """Each rank makes its part of a sum; the result is replicated."""
    is_token_local: ClassVar[bool] = False
    """A call on a rank's tokens is as well a call on a part of them."""
    is_window: ClassVar[bool] = False
    """Its result is stored as its operand: it is no call of its own."""

    def emit(self, call: LocalCall) -> Node:
        """The call that one rank makes, on operands in the placements of the mode."""
        return call.copy()

    @property
    def is_free(self) -> bool:
        """Whether nothing is computed: the value is stored as another one already."""
        return False

    def merged(self, other: SplitMode) -> Self:
        """A call from one line to another takes each operand as its own line says."""
        pairs = zip(self.operands, other.operands, strict=True)
        sharded = Placement.SHARDED
        return replace(self, operands=tuple(sharded if sharded in p else p[0] for p in pairs))


@dataclass(frozen=True)
class CannotSplit:
    """Why a call needs all tokens."""

    reason: str


@dataclass(frozen=True, eq=False, kw_only=True)
class CallOnLine:
    """A call, and how its operands and results hold the tokens of one line."""

    lines: Lines
    named: NamedOp
    line: int
    operands: tuple[MaybeTokenDim, ...]
    results: tuple[MaybeTokenDim, ...]

    @staticmethod
    def of(lines: Lines, named: NamedOp, line: int) -> CallOnLine:
        node = named.call.node
        results = range(len(result_values(node)))
        return CallOnLine(
            lines=lines,
            named=named,
            line=line,
            operands=tuple(lines.token_dim(n) for n in named.call.operands),
            results=tuple(lines.token_dim(node, i) for i in results),
        )

    @property
    def node(self) -> Node:
        return self.named.call.node

    @property
    def call(self) -> Call:
        return self.named.call

    @property
    def axes(self) -> OpAxes:
        return self.named.axes

    @property
    def source(self) -> MaybeTokenDim:
        """Of the first operand."""
        return self.operands[0] if self.operands else None

    @property
    def chunk_length(self) -> int:
        """Tokens that a rank and its neighbour hold next to each other."""
        return self.lines.lines[self.line].layout.chunk_length

    @property
    def touches_line(self) -> bool:
        values = (*self.operands, *self.results)
        return any(self.on_line(x) or isinstance(x, NotShardable) for x in values)

    def on_line(self, tokens: MaybeTokenDim) -> TypeGuard[TokenDim]:
        return isinstance(tokens, TokenDim) and tokens.line == self.line

    def rest(self, placement: Placement) -> tuple[Placement, ...]:
        """The same placement for every operand but the first."""
        return (placement,) * (len(self.operands) - 1)


def is_alone_on(tokens: MaybeTokenDim, call: CallOnLine, dim: int) -> TypeGuard[TokenDim]:
    """Whether tokens of the line, and nothing else, are a dimension of a value."""
    return call.on_line(tokens) and tokens.dim == dim and tokens.outer * tokens.inner == 1


Match: TypeAlias = Callable[[CallOnLine], SplitMode | CannotSplit | None]
"""The mode of a call, why it has none, or None where another mode is to be asked."""
