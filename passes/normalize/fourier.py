"""Fourier transforms of several dimensions, as one of each: tokens are one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Node

from ringfx.passes.axes.call import Call
from ringfx.passes.normalize.graph_editor import GraphEditor

__all__ = ["RULES"]

aten = torch.ops.aten


def _one_by_one(first: Any, others: Any, last: Any) -> Callable[[GraphEditor, Node], Node | None]:
    """``first`` of the last dimension, then ``others`` of those before, or those and then ``last``:
    only the last one has half of its frequencies."""

    def rule(s: GraphEditor, node: Node) -> Node | None:
        call = Call(node)
        x, rank, sizes = call.operands[0], len(call.shapes[0]), call.get("s")
        dims = [d % rank for d in _dims(call, rank)]
        if len(dims) < 2 or not any(s.touches(x, d) for d in dims):
            return None
        lengths = dict(zip(dims, sizes or [None] * len(dims), strict=True))
        ways = dict.fromkeys(dims[:-1], others) | {dims[-1]: first or last}
        for d in dims if last else reversed(dims):
            x = s.make(node, ways[d], x, lengths[d], d, call.get("norm"))
        return x

    return rule


def _dims(call: Call, rank: int) -> list[int]:
    """``dim``, else as many of the last dimensions as there are sizes, else all."""
    given: Any = call["dim"]
    if given is not None:
        return list(given)
    sizes = call.get("s")
    return list(range(0 if sizes is None else rank - len(sizes), rank))


_FORWARD = _one_by_one(aten.fft_fft.default, aten.fft_fft.default, None)
_BACK = _one_by_one(aten.fft_ifft.default, aten.fft_ifft.default, None)
_OF_REAL = _one_by_one(aten.fft_rfft.default, aten.fft_fft.default, None)
_TO_REAL = _one_by_one(None, aten.fft_ifft.default, aten.fft_irfft.default)

RULES: Mapping[object, Callable[[GraphEditor, Node], Node | None]] = {
    aten.fft_fft2.default: _FORWARD,
    aten.fft_fftn.default: _FORWARD,
    aten.fft_ifft2.default: _BACK,
    aten.fft_ifftn.default: _BACK,
    aten.fft_rfft2.default: _OF_REAL,
    aten.fft_rfftn.default: _OF_REAL,
    aten.fft_irfft2.default: _TO_REAL,
    aten.fft_irfftn.default: _TO_REAL,
}
