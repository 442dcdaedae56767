"""The end of one token axis and the start of another: an all-to-all between two splits."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from ringfx.comm import redistribute, turn
from ringfx.ir.values import CommKind
from ringfx.passes.axes import how
from ringfx.passes.capture.gradients import needs_grad
from ringfx.passes.capture.origin import describe_node
from ringfx.passes.split_modes.local_call import LocalCall
from ringfx.passes.split_modes.local_graph import COMPLETES_GRADIENT, num_bytes
from ringfx.passes.split_modes.mode import CallOnLine, CannotSplit, SplitMode
from ringfx.passes.split_modes.placement import Placement
from ringfx.passes.token_axes.token_line import TokenDim

__all__ = ["Reshard"]

TURNED = "resharded: whole rows of fewer channels, or back"


@dataclass(frozen=True, kw_only=True)
class Reshard(SplitMode):
    """From one split to another, or this rank's part of a replicated value."""

    @staticmethod
    def match(call: CallOnLine) -> Reshard | CannotSplit | None:
        if not isinstance(call.axes.how, how.Reshard):
            return None
        if not isinstance(call.results[0], TokenDim):
            return CannotSplit(call.axes.reason)
        sharded = call.on_line(call.source)
        return Reshard(operands=(Placement.SHARDED if sharded else Placement.REPLICATED,))

    def emit(self, call: LocalCall) -> Node:
        (operand,) = call.operands
        if self.operands[0] is not Placement.SHARDED:
            return call.local.shard(call.node, operand)
        node, source, result = call.node, call.source, call.result
        size = num_bytes(node) // call.layout(result).world_size
        is_turn = source.dim != result.dim
        reason = TURNED if is_turn else "resharded: the next ops shard another token axis"
        call.report(CommKind.ALL_TO_ALL, size, reason)
        if needs_grad(node):
            call.report(CommKind.ALL_TO_ALL, size, COMPLETES_GRADIENT, in_backward=True)
        spreads = [_spread(call, tokens) for tokens in (source, result)]
        if is_turn:
            dims = (source.dim, result.dim, call.local.group, describe_node(node))
            return call.emit(turn.turn_tokens, operand, *spreads, *dims)
        valid = call.local.valid(result) if call.has_padding(result) else None
        where = (valid, result.dim, call.local.group, describe_node(node))
        return call.emit(redistribute.move_tokens, operand, *spreads, *where)


def _spread(call: LocalCall, tokens: TokenDim) -> list[int]:
    layout, member = call.layout(tokens), tokens.member
    spread = redistribute.Spread(
        kind=redistribute.KINDS.index(layout.kind), line=layout.length, ranks=layout.world_size,
        offset=member.offset, length=member.length, outer=tokens.outer, inner=tokens.inner,
    )  # fmt: skip
    return spread.numbers()
