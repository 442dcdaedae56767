"""Concatenations along the tokens, and pieces that move to where the joined line has them."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from ringfx.comm import halo, token_lookup
from ringfx.passes.axes import how
from ringfx.passes.split_modes.local_call import LocalCall
from ringfx.passes.split_modes.mode import CallOnLine, SplitMode, is_alone_on
from ringfx.passes.split_modes.placement import Placement
from ringfx.passes.token_axes.token_line import MaybeTokenDim, TokenDim

__all__ = ["Concat", "shift_tokens"]


@dataclass(frozen=True, kw_only=True)
class Concat(SplitMode):
    """Every local token comes from the piece that it lies in; pieces on the line stay sharded."""

    starts: tuple[int, ...]
    """Where in the result each operand starts."""
    by: tuple[int, ...]
    """For each operand how many positions it moves: its element at p + by is wanted at p."""

    @staticmethod
    def match(call: CallOnLine) -> Concat | None:
        family = call.axes.how
        if not isinstance(family, how.Concat):
            return None
        if not any(is_alone_on(result, call, family.dim) for result in call.results):
            return None
        return _mode(call, family)

    def emit(self, call: LocalCall) -> Node:
        moved = [
            shift_tokens(call, operand, value, by)
            for operand, value, by in zip(call.operands, call.call.operands, self.by, strict=True)
        ]
        sharded = [placement is Placement.SHARDED for placement in self.operands]
        args = (list(self.starts), sharded, call.local.own(call.result), call.result.dim)
        return call.emit(token_lookup.join_pieces, moved, *args)


def _mode(call: CallOnLine, family: how.Concat) -> Concat:
    (result,) = call.results
    assert isinstance(result, TokenDim)
    by = [
        _shift(call, piece, result, start, family.dim)
        for piece, start in zip(call.operands, family.starts, strict=True)
    ]
    return Concat(
        operands=tuple(
            Placement.REPLICATED_PARTIAL_GRAD if shift is None else Placement.SHARDED
            for shift in by
        ),
        starts=family.starts,
        by=tuple(shift or 0 for shift in by),
    )


def _shift(
    call: CallOnLine, piece: MaybeTokenDim, result: TokenDim, start: int, dim: int
) -> int | None:
    """How far a piece moves; None where it is not stored with the result or too far away."""
    if not is_alone_on(piece, call, dim):
        return None
    shift = piece.member.offset - result.member.offset - start
    return shift if abs(shift) <= call.chunk_length else None


def shift_tokens(call: LocalCall, operand: Node, value: Node, by: int) -> Node:
    """The operand moved by a few positions, tokens at the ends of runs from their neighbours."""
    if not by:
        return operand
    tokens = call.tokens_of(value)
    call.report_halo(value, abs(by))
    chunks = call.layout(tokens).chunks_per_rank
    where = (chunks, call.local.group, tokens.dim, tokens.outer, tokens.inner)
    return call.emit(halo.shift_tokens, operand, by, call.local.valid(call.result), *where)
