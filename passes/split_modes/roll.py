"""Rolls along the tokens: each run takes a few from its neighbour, the last from the front."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from ringfx.comm import halo
from ringfx.ir.values import CommKind
from ringfx.passes.axes import how
from ringfx.passes.capture.origin import describe_node
from ringfx.passes.split_modes.local_call import LocalCall
from ringfx.passes.split_modes.local_graph import COMPLETES_GRADIENT
from ringfx.passes.split_modes.mode import CallOnLine, CannotSplit, SplitMode
from ringfx.passes.split_modes.placement import Placement
from ringfx.passes.token_axes.token_line import TokenDim

__all__ = ["Roll"]


@dataclass(frozen=True, kw_only=True)
class Roll(SplitMode):
    """``y[e] = x[e + by]``, elements counted round the axis."""

    by: int
    num_tokens: int
    """Tokens that have the elements which each run needs from its neighbour."""

    @staticmethod
    def match(call: CallOnLine) -> Roll | CannotSplit | None:
        family, source = call.axes.how, call.source
        if not isinstance(family, how.Roll) or not isinstance(source, TokenDim):
            return None
        if source.dim != family.dim:
            return None
        size = int(call.call.shapes[0][source.dim])
        by = -family.shift % size
        by = by if 2 * by <= size else by - size
        num_tokens = -(-abs(by) // source.inner)
        if source.outer != 1 or source.member.is_sorted:
            return CannotSplit(call.axes.reason)
        if num_tokens > call.lines.lines[source.line].layout.chunk_length:
            return CannotSplit("it shifts tokens beyond the neighbouring run")
        return Roll(operands=(Placement.SHARDED,), by=by, num_tokens=num_tokens)

    def emit(self, call: LocalCall) -> Node:
        value, source = call.call.operands[0], call.source
        call.report_halo(value, self.num_tokens)
        size = call.token_bytes(value) * self.num_tokens
        call.report(CommKind.ALL_REDUCE, size, "tokens of the other end")
        call.report(CommKind.ALL_REDUCE, size, COMPLETES_GRADIENT, in_backward=True)
        own, length = call.local.own(source), source.member.length
        chunks = call.layout(source).chunks_per_rank
        where = (chunks, call.local.group, source.dim, source.inner, describe_node(call.node))
        return call.emit(
            halo.roll_tokens, call.operands[0], self.by, self.num_tokens, own, length, *where
        )
