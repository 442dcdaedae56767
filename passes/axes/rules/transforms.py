"""Fourier transforms, means and maxima of windows: all of the dimensions that they go along, each
point of the others alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ringfx.passes.axes.call import AxisRule, Call, OpAxes
from ringfx.passes.axes.rules.pattern import shares
from ringfx.passes.axes.rules.views import numbered
from ringfx.torch_compat.operators import OpOverload

__all__ = ["ALONG_A_SEQUENCE", "RULES"]

aten = torch.ops.aten


def along_dims(
    dims_of: Callable[[Call, int], Sequence[int]], reason: str = "it transforms the axis"
) -> AxisRule:
    """``dims_of``: the dimensions of a call on a tensor of some rank."""

    def rule(call: Call) -> OpAxes:
        rank = len(call.shapes[0])
        dims = {d % rank for d in dims_of(call, rank)}
        result = call.result_shape
        made = tuple(
            ((f"made{i}",) if result[i] != 1 else ()) if i in dims else label
            for i, label in enumerate(numbered(call.shapes[0]))
        )
        return OpAxes(
            operands=(numbered(call.shapes[0]),) * len(call.operands),
            results=(made,) * len(call.result_shapes),
            share=shares(needs_all=[f"{kind}{i}" for i in dims for kind in ("d", "made")]),
            reason=reason,
        )

    return rule


def _all(call: Call, rank: int) -> Sequence[int]:
    """``dim``, else as many of the last dimensions as there are sizes, else all."""
    given: Any = call["dim"]
    if given is not None:
        return list(given)
    sizes = call.get("s")
    return range(rank) if sizes is None else range(rank - len(sizes), rank)


_ONE = along_dims(lambda call, rank: [call["dim"]])
_GIVEN = along_dims(lambda call, rank: call["dim"])
_ALL = along_dims(_all)

_WINDOWS = "its windows see neighbours along the axis"
_PLANES = along_dims(lambda call, rank: (rank - 2, rank - 1), _WINDOWS)
_SPACES = along_dims(lambda call, rank: range(rank - 3, rank), _WINDOWS)

RULES: dict[OpOverload, AxisRule] = {
    **dict.fromkeys(
        (
            aten.avg_pool2d.default, aten.max_pool2d_with_indices.default,
            aten.adaptive_max_pool2d.default, aten.max_unpool2d.default,
        ),
        _PLANES,
    ),
    **dict.fromkeys(
        (
            aten.avg_pool3d.default, aten.max_pool3d_with_indices.default,
            aten.adaptive_max_pool3d.default, aten.max_unpool3d.default,
            aten._adaptive_avg_pool3d.default,
        ),
        _SPACES,
    ),
    aten.glu.default: along_dims(lambda call, rank: [call["dim"]], "it gates one half by another"),
    **dict.fromkeys(
        (
            aten.fft_fft.default, aten.fft_ifft.default, aten.fft_rfft.default,
            aten.fft_irfft.default, aten.fft_hfft.default, aten.fft_ihfft.default,
        ),
        _ONE,
    ),
    **dict.fromkeys(
        (
            aten.fft_fft2.default, aten.fft_ifft2.default, aten.fft_rfft2.default,
            aten.fft_irfft2.default, aten._fft_c2c.default, aten._fft_r2c.default,
            aten._fft_c2r.default,
        ),
        _GIVEN,
    ),
    **dict.fromkeys(
        (
            aten.fft_fftn.default, aten.fft_ifftn.default, aten.fft_rfftn.default,
            aten.fft_irfftn.default, aten.fft_fftshift.default, aten.fft_ifftshift.default,
        ),
        _ALL,
    ),
}  # fmt: skip

ALONG_A_SEQUENCE = frozenset(RULES) - {aten.glu.default}
"""What is taken along time or space, and hardly ever along features."""
