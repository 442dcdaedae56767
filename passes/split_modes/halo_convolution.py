"""Convolutions along the tokens: each token's outputs read a few tokens before and after it."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from ringfx.comm import conjugate, halo
from ringfx.passes.axes import how
from ringfx.passes.split_modes.local_call import LocalCall
from ringfx.passes.split_modes.mode import CallOnLine, CannotSplit, SplitMode
from ringfx.passes.split_modes.placement import Placement
from ringfx.passes.token_axes.token_line import TokenDim

__all__ = ["HaloConvolution"]


@dataclass(frozen=True, kw_only=True)
class HaloConvolution(SplitMode):
    """Each run of tokens, with what its neighbours have next to it (``halo.convolve_tokens``)."""

    lead: int
    frames: int
    before: int
    """Tokens of the halo on each side."""
    after: int

    @staticmethod
    def match(call: CallOnLine) -> HaloConvolution | CannotSplit | None:
        family, source = call.axes.how, call.source
        if not isinstance(family, how.Halo) or not isinstance(source, TokenDim):
            return None
        return _mode(call, source) if source.dim in family.dims else None

    def emit(self, call: LocalCall) -> Node:
        source, result = call.source, call.result
        x, weight, *bias = call.operands
        if call.has_padding(source):
            where = (0, source.dim, source.outer, source.inner)
            x = call.emit(conjugate.mask_tokens, x, call.local.valid(source), *where)
        if self.before or self.after:
            call.report_halo(call.call.operands[0], self.before + self.after)
        settings = dict(call.node.kwargs) | {
            "lead": self.lead,
            "frames": self.frames,
            "before": self.before,
            "after": self.after,
            "chunks": call.layout(source).chunks_per_rank,
            "group": call.local.group,
            "dim": source.dim,
        }
        given = (weight, bias[0] if bias else None)
        y = call.emit(halo.convolve_tokens, x, *given, **settings)
        if not call.has_padding(result):
            return y
        place = {"dim": result.dim, "outer": result.outer, "inner": result.inner}
        args = (y, call.operands[0], *given, call.local.valid(result))
        return call.emit(halo.fill_convolved, *args, **(dict(call.node.kwargs) | place))


def _mode(call: CallOnLine, source: TokenDim) -> HaloConvolution | CannotSplit:
    at, result = source.dim - 2, call.results[0]
    stride, (left, _) = call.call["stride"][at], call.call["pads"][at]
    if (
        not call.on_line(source)
        or not call.on_line(result)
        or result.dim != source.dim
        or source.outer * result.outer != 1
        or source.inner != stride * result.inner
    ):
        return CannotSplit(call.axes.reason)
    frames = source.inner
    lead = left - frames * (source.member.offset - result.member.offset)
    seen = call.call["dilation"][at] * (int(call.call.shapes[1][source.dim]) - 1)
    last = stride * (result.inner - 1) - lead + seen
    before = -(-max(lead, 0) // frames)
    after = -(-max(last - frames + 1, 0) // frames)
    if max(before, after) > call.chunk_length:
        return CannotSplit("its kernel reaches beyond the neighbouring run of tokens")
    placements = (Placement.SHARDED, *call.rest(Placement.REPLICATED_PARTIAL_GRAD))
    return HaloConvolution(
        operands=placements, lead=lead, frames=frames, before=before, after=after
    )
