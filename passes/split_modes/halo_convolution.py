"""Convolutions and pools along the tokens: a token's outputs read some tokens on both sides."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from ringfx.comm import conjugate, halo, halo_pools, halo_transposed
from ringfx.passes.axes import how
from ringfx.passes.split_modes.local_call import LocalCall
from ringfx.passes.split_modes.mode import CallOnLine, CannotSplit, SplitMode
from ringfx.passes.split_modes.placement import Placement
from ringfx.passes.token_axes.token_line import TokenDim

__all__ = ["HaloConvolution", "HaloPool", "HaloTransposed"]


@dataclass(frozen=True, kw_only=True)
class Reach:
    """What the windows of a run of tokens see, as ``halo.convolve_tokens`` is told."""

    lead: int
    frames: int
    before: int
    """Tokens of the halo on each side."""
    after: int

    def settings(self, call: LocalCall) -> dict[str, Any]:
        """Of the call that one rank makes; its messages are reported."""
        return {"lead": self.lead} | _exchanged(call, self.frames, self.before, self.after)


@dataclass(frozen=True, kw_only=True)
class HaloConvolution(SplitMode):
    """Each run of tokens, with what its neighbours have next to it (``halo.convolve_tokens``)."""

    reach: Reach

    @staticmethod
    def match(call: CallOnLine) -> HaloConvolution | CannotSplit | None:
        source = _source(call, halo.convolution)
        if source is None:
            return None
        reach = _reach(call, source, int(call.call.shapes[1][source.dim]))
        if isinstance(reach, CannotSplit):
            return reach
        placements = (Placement.SHARDED, *call.rest(Placement.REPLICATED_PARTIAL_GRAD))
        return HaloConvolution(operands=placements, reach=reach)

    def emit(self, call: LocalCall) -> Node:
        _, weight, *bias = call.operands
        given, settings = (weight, bias[0] if bias else None), self.reach.settings(call)
        return _emitted(call, halo.convolve_tokens, halo.fill_convolved, given, settings)


@dataclass(frozen=True, kw_only=True)
class HaloPool(SplitMode):
    """The same for maxima and means of windows (``halo_pools.pool_tokens``)."""

    reach: Reach

    @staticmethod
    def match(call: CallOnLine) -> HaloPool | CannotSplit | None:
        source = _source(call, halo_pools.pool)
        if source is None:
            return None
        reach = _reach(call, source, int(call.call["kernel"][source.dim - 2]))
        if isinstance(reach, CannotSplit):
            return reach
        return HaloPool(operands=(Placement.SHARDED,), reach=reach)

    def emit(self, call: LocalCall) -> Node:
        nothing, settings = halo_pools.NOTHING[call.call["kind"]], self.reach.settings(call)
        return _emitted(call, halo_pools.pool_tokens, halo_pools.fill_pooled, (), settings, nothing)


@dataclass(frozen=True, kw_only=True)
class HaloTransposed(SplitMode):
    """The same for transposed convolutions (``halo_transposed.transposed_tokens``)."""

    frames: int
    before: int
    after: int

    @staticmethod
    def match(call: CallOnLine) -> HaloTransposed | CannotSplit | None:
        source = _source(call, halo_transposed.transposed_convolution)
        if source is None:
            return None
        at, result = source.dim - 2, call.results[0]
        stride, (left, _) = call.call["stride"][at], call.call["crops"][at]
        if (
            not call.on_line(source)
            or not call.on_line(result)
            or result.dim != source.dim
            or source.outer * result.outer != 1
            or result.inner != stride * source.inner
            or source.member.offset != result.member.offset
        ):
            return CannotSplit(call.axes.reason)
        reach = call.call["dilation"][at] * (int(call.call.shapes[1][source.dim]) - 1)
        earlier = max((reach - left) // stride, 0)
        later = max(-(-left // stride), -(-(left - reach - 1) // stride) + 1)
        before, after = -(-earlier // source.inner), -(-later // source.inner)
        if max(before, after) > call.chunk_length:
            return CannotSplit("its kernel reaches beyond the neighbouring run of tokens")
        placements = (Placement.SHARDED, *call.rest(Placement.REPLICATED_PARTIAL_GRAD))
        return HaloTransposed(operands=placements, frames=source.inner, before=before, after=after)

    def emit(self, call: LocalCall) -> Node:
        _, weight, *bias = call.operands
        given = (weight, bias[0] if bias else None)
        settings = _exchanged(call, self.frames, self.before, self.after)
        tokens, filled = halo_transposed.transposed_tokens, halo_transposed.fill_transposed
        return _emitted(call, tokens, filled, given, settings)


def _exchanged(call: LocalCall, frames: int, before: int, after: int) -> dict[str, Any]:
    """The user's settings with those of the exchange, which is reported."""
    if before or after:
        call.report_halo(call.call.operands[0], before + after)
    return dict(call.node.kwargs) | {
        "frames": frames,
        "before": before,
        "after": after,
        "chunks": call.layout(call.source).chunks_per_rank,
        "group": call.local.group,
        "dim": call.source.dim,
    }


def _emitted(
    call: LocalCall,
    tokens: Callable[..., Any],
    filled: Callable[..., Any],
    given: Sequence[Node | None],
    settings: Mapping[str, Any],
    nothing: float = 0.0,
) -> Node:
    """``tokens`` of this rank's own; padding counts for ``nothing``, and gets numbers of ``filled``
    that no later operator stumbles over."""
    source, result, x = call.source, call.result, call.operands[0]
    if call.has_padding(source):
        where = (source.dim, source.outer, source.inner)
        x = call.emit(conjugate.mask_tokens, x, call.local.valid(source), nothing, *where)
    y = call.emit(tokens, x, *given, **settings)
    if not call.has_padding(result):
        return y
    place = {"dim": result.dim, "outer": result.outer, "inner": result.inner}
    args = (y, call.operands[0], *given, call.local.valid(result))
    return call.emit(filled, *args, **(dict(call.node.kwargs) | place))


def _source(call: CallOnLine, target: object) -> TokenDim | None:
    """Where a call of this kind has tokens that its windows run along."""
    family, source = call.axes.how, call.source
    if call.call.node.target is not target or not isinstance(family, how.Halo):
        return None
    return source if isinstance(source, TokenDim) and source.dim in family.dims else None


def _reach(call: CallOnLine, source: TokenDim, kernel: int) -> Reach | CannotSplit:
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
    seen = call.call["dilation"][at] * (kernel - 1)
    last = stride * (result.inner - 1) - lead + seen
    before = -(-max(lead, 0) // frames)
    after = -(-max(last - frames + 1, 0) // frames)
    if max(before, after) > call.chunk_length:
        return CannotSplit("its kernel reaches beyond the neighbouring run of tokens")
    return Reach(lead=lead, frames=frames, before=before, after=after)
