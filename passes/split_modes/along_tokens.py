"""Scans, softmaxes, flips and reductions along the tokens: little is exchanged beside a rank's own.

``comm.scans``, ``comm.reductions`` and ``comm.mirror`` are what each rank runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from ringfx.comm import mirror, reductions, scans
from ringfx.ir.values import CommKind
from ringfx.passes.axes import how
from ringfx.passes.axes.call import result_values
from ringfx.passes.capture.gradients import needs_grad
from ringfx.passes.capture.origin import describe_node
from ringfx.passes.split_modes.local_call import LocalCall
from ringfx.passes.split_modes.local_graph import COMPLETES_GRADIENT
from ringfx.passes.split_modes.mode import CallOnLine, CannotSplit, SplitMode
from ringfx.passes.split_modes.placement import Placement
from ringfx.passes.token_axes.token_line import TokenDim

__all__ = ["Flip", "Reduction", "Scan", "Softmax"]

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Scan(SplitMode):
    """Each run of tokens is scanned alone; runs after it are given its last element."""

    @staticmethod
    def match(call: CallOnLine) -> Scan | CannotSplit | None:
        family, source = call.axes.how, call.source
        if not isinstance(family, how.Scan) or not isinstance(source, TokenDim):
            return None
        if source.dim != family.dim:
            return None
        is_extreme = len(call.results) > 1
        if source.outer != 1 or source.member.is_sorted or (is_extreme and _is_truth(call.node)):
            return CannotSplit(call.axes.reason)
        return Scan(operands=(Placement.SHARDED,))

    def emit(self, call: LocalCall) -> Node:
        source, name = call.source, call.call.name.split(".")[1]
        layout = call.layout(source)
        runs = layout.chunks_per_rank * layout.world_size
        _report(call, runs * _row_bytes(call), "a value of each run")
        own, length, offset = call.local.own(source), source.member.length, source.member.offset
        where = (
            offset, layout.chunks_per_rank, layout.world_size, call.local.group, source.dim,
            source.inner, describe_node(call.node),
        )  # fmt: skip
        if name in scans.SCANS:
            dtype = result_values(call.node)[0].dtype
            return call.emit(scans.scan_tokens, call.operands[0], own, length, name, dtype, *where)
        return call.emit(scans.scan_with_places, call.operands[0], own, length, name, *where)


@dataclass(frozen=True, kw_only=True)
class Softmax(SplitMode):
    """Its row's maximum and sum are those of all ranks; the result stays sharded."""

    @staticmethod
    def match(call: CallOnLine) -> Softmax | CannotSplit | None:
        family, source = call.axes.how, call.source
        if not isinstance(family, how.Normalise) or not isinstance(source, TokenDim):
            return None
        if source.dim != family.dim:
            return None
        if source.member.is_sorted:
            return CannotSplit(call.axes.reason)
        return Softmax(operands=(Placement.SHARDED,))

    def emit(self, call: LocalCall) -> Node:
        _report(call, 2 * _row_bytes(call), "a row's maximum and sum")
        target, x, dtype = call.node.target, call.operands[0], call.node.meta["val"].dtype
        given = (x, call.local.valid(call.source), dtype)
        if target in (aten.log_softmax.int, aten._log_softmax.default):
            return call.emit(reductions.log_softmax_tokens, *given, *_where(call))
        is_safe = target is aten._safe_softmax.default
        return call.emit(reductions.softmax_tokens, *given, is_safe, *_where(call))


@dataclass(frozen=True, kw_only=True)
class Flip(SplitMode):
    """Ranks at opposite ends exchange their tokens; what that does to padding is put right."""

    dims: tuple[int, ...]
    by: int

    @staticmethod
    def match(call: CallOnLine) -> Flip | CannotSplit | None:
        family, source = call.axes.how, call.source
        if not isinstance(family, how.Flip) or not isinstance(source, TokenDim):
            return None
        if source.dim not in family.dims:
            return None
        layout, member = call.lines.lines[source.line].layout, source.member
        by = layout.padded_length - member.length - 2 * member.offset
        if source.outer != 1 or member.is_sorted or abs(by) > layout.chunk_length:
            return CannotSplit(call.axes.reason)
        return Flip(operands=(Placement.SHARDED,), dims=tuple(sorted(family.dims)), by=by)

    def emit(self, call: LocalCall) -> Node:
        source, value = call.source, call.call.operands[0]
        layout = call.layout(source)
        if layout.chunks_per_rank == 1:
            size = call.token_bytes(value) * layout.local_length
            for in_backward in (False, True) if needs_grad(call.node) else (False,):
                call.report(
                    CommKind.ALL_TO_ALL, size, "the order reversed", in_backward=in_backward
                )
        if self.by:
            call.report_halo(value, abs(self.by))
        where = (layout.chunks_per_rank, call.local.group, source.dim, source.inner)
        given = (call.operands[0], list(self.dims), self.by, call.local.valid(source))
        return call.emit(mirror.flip_tokens, *given, *where, describe_node(call.node))


@dataclass(frozen=True, kw_only=True)
class Reduction(SplitMode):
    """A maximum, a logsumexp, any, all: that of what each rank makes of its own tokens."""

    is_partial_sum: ClassVar[bool] = True

    @staticmethod
    def match(call: CallOnLine) -> Reduction | CannotSplit | None:
        family, source = call.axes.how, call.source
        if not isinstance(family, how.Reduce) or not isinstance(source, TokenDim):
            return None
        if source.dim not in family.dims:
            return None
        finds_place = call.node.target in (aten.max.dim, aten.min.dim)
        unordered = source.member.is_sorted or (finds_place and source.outer != 1)
        if unordered or (_is_truth(call.node) and call.node.target not in _TRUTHS):
            return CannotSplit(call.axes.reason)
        return Reduction(operands=(Placement.SHARDED,))

    def emit(self, call: LocalCall) -> Node:
        source, x, target, given = call.source, call.operands[0], call.node.target, call.call
        family = call.axes.how
        assert isinstance(family, how.Reduce)
        valid, ranks = call.local.valid(source), call.layout(source).world_size
        _report(call, 2 * _row_bytes(call), "the largest of all ranks")
        how_reduced = (tuple(sorted(family.dims)), bool(given.get("keepdim", False)))
        if target is aten.logsumexp.default:
            dtype = call.node.meta["val"].dtype
            settings = (x, valid, dtype, *how_reduced, *_where(call))
            return call.emit(reductions.logsumexp_of_tokens, *settings)
        if target in _TRUTHS:
            settings = (x, valid, _TRUTHS[target], *how_reduced, ranks, *_where(call))
            return call.emit(reductions.truth_of_tokens, *settings)
        kind = "amax" if target in _LARGEST else "amin"
        if target in (aten.max.dim, aten.min.dim):
            own, length = call.local.own(source), source.member.length
            group, dim, _, inner, what = _where(call)
            settings = (x, own, length, kind, how_reduced[1], ranks, group, dim, inner, what)
            return call.emit(reductions.first_extreme, *settings)
        settings = (x, valid, kind, *how_reduced, ranks, *_where(call))
        return call.emit(reductions.extreme_of_tokens, *settings)


_LARGEST = frozenset({aten.amax.default, aten.max.default, aten.max.dim})
_TRUTHS = {
    **dict.fromkeys((aten.any.default, aten.any.dim, aten.any.dims), "any"),
    **dict.fromkeys((aten.all.default, aten.all.dim, aten.all.dims), "all"),
}


def _is_truth(node: Node) -> bool:
    value: torch.Tensor = node.all_input_nodes[0].meta["val"]
    return value.dtype is torch.bool


def _where(call: LocalCall) -> tuple[Any, ...]:
    source = call.source
    place = (source.dim, source.outer, source.inner)
    return (call.local.group, *place, describe_node(call.node))


def _row_bytes(call: LocalCall) -> int:
    """Bytes of one element of the tokens' dimension."""
    value: torch.Tensor = call.call.operands[0].meta["val"]
    return value.numel() * value.element_size() // max(value.shape[call.source.dim], 1)


def _report(call: LocalCall, size: int, reason: str) -> None:
    call.report(CommKind.ALL_REDUCE, size, reason)
    if needs_grad(call.node):
        call.report(CommKind.ALL_REDUCE, size, COMPLETES_GRADIENT, in_backward=True)
