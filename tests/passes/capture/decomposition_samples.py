"""Calls of everything that capture may take apart, on ordinary values and at edge points."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

__all__ = ["CALLS", "EDGES", "LOSSES"]

aten = torch.ops.aten
Args = tuple[Any, ...]
Calls = Mapping[Any, Callable[[torch.Tensor], Args]]
"""Operator -> its arguments, made of 48 numbers."""

EDGES: Mapping[str, torch.Tensor] = {
    "ordinary": torch.randn(48, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
    "zeros": torch.tensor([0.0, -0.0], dtype=torch.float64).repeat(24),
    "ties": torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64).repeat(16),
    "kinks": torch.tensor([-3, -1, -0.5, 0.5, 1, 3], dtype=torch.float64).repeat(8),
    "subnormal": torch.full((48,), 5e-324, dtype=torch.float64),
    "large": torch.tensor([1e300, -1e300], dtype=torch.float64).repeat(24),
}


def plane(x: torch.Tensor) -> torch.Tensor:
    return x.view(2, 2, 3, 4)


def line(x: torch.Tensor) -> torch.Tensor:
    return x.view(2, 4, 6)


def space(x: torch.Tensor) -> torch.Tensor:
    return x.view(1, 2, 2, 3, 4)


def rows(x: torch.Tensor) -> torch.Tensor:
    return x.view(6, 8)


def _each(ops: tuple[Any, ...], args: Callable[[torch.Tensor], Args]) -> Calls:
    return dict.fromkeys(ops, args)


INDEX = torch.tensor([2, 0, 2])
CALLS: Calls = {
    **_each(
        (
            aten.alias_copy.default, aten.diag_embed.default, aten.diagonal_copy.default,
            aten.lift.default, aten.rot90.default, aten.t_copy.default, aten.trace.default,
            aten.unbind_copy.int, aten.squeeze_copy.default,
        ),
        lambda x: (rows(x),),
    ),
    aten._reshape_alias.default: lambda x: (rows(x), [4, 12], [12, 1]),
    aten._unsafe_index.Tensor: lambda x: (rows(x), [INDEX]),
    aten._unsafe_index_put.default: lambda x: (rows(x), [INDEX], rows(x)[:3] * 2, True),
    aten.as_strided_copy.default: lambda x: (x, [3, 4], [8, 2]),
    aten.block_diag.default: lambda x: ([rows(x), rows(x)],),
    aten.channel_shuffle.default: lambda x: (line(x), 2),
    aten.expand_copy.default: lambda x: (rows(x)[:, :1], [6, 3]),
    aten.narrow_copy.default: lambda x: (rows(x), 0, 1, 3),
    aten.permute_copy.default: lambda x: (line(x), [2, 0, 1]),
    aten.pixel_shuffle.default: lambda x: (x.view(1, 4, 3, 4), 2),
    aten.pixel_unshuffle.default: lambda x: (x.view(1, 2, 4, 6), 2),
    **_each(
        (aten.reflection_pad1d.default, aten.replication_pad1d.default),
        lambda x: (line(x), [2, 1]),
    ),
    **_each(
        (aten.reflection_pad2d.default, aten.replication_pad2d.default),
        lambda x: (plane(x), [2, 1, 1, 1]),
    ),
    **_each(
        (aten.reflection_pad3d.default, aten.replication_pad3d.default),
        lambda x: (space(x), [2, 1, 1, 1, 1, 0]),
    ),
    aten.select_scatter.default: lambda x: (rows(x), rows(x)[0] * 2, 0, 3),
    aten.split_with_sizes_copy.default: lambda x: (rows(x), [2, 4]),
    aten.squeeze_copy.dim: lambda x: (rows(x)[:1], 0),
    aten.squeeze_copy.dims: lambda x: (rows(x)[:1], [0]),
    aten.take.default: lambda x: (rows(x), INDEX),
    aten.transpose_copy.int: lambda x: (rows(x), 0, 1),
    aten.unfold_copy.default: lambda x: (rows(x), 1, 3, 2),
    aten.unsafe_split.Tensor: lambda x: (rows(x), 2),
    aten.unsafe_split_with_sizes.default: lambda x: (rows(x), [2, 4]),
    aten.unsqueeze_copy.default: lambda x: (rows(x), 1),
    aten.view_copy.default: lambda x: (rows(x), [4, 12]),
    **_each(
        (aten._upsample_nearest_exact1d.default, aten.upsample_nearest1d.default),
        lambda x: (line(x), [9]),
    ),
    **_each(
        (aten._upsample_nearest_exact2d.default, aten.upsample_nearest2d.default),
        lambda x: (plane(x), [5, 7]),
    ),
    **_each(
        (aten._upsample_nearest_exact3d.default, aten.upsample_nearest3d.default),
        lambda x: (space(x), [3, 5, 7]),
    ),
    **_each(
        (aten._upsample_nearest_exact1d.vec, aten.upsample_nearest1d.vec),
        lambda x: (line(x), [9], None),
    ),
    **_each(
        (aten._upsample_nearest_exact2d.vec, aten.upsample_nearest2d.vec),
        lambda x: (plane(x), [5, 7], None),
    ),
    **_each(
        (aten._upsample_nearest_exact3d.vec, aten.upsample_nearest3d.vec),
        lambda x: (space(x), [3, 5, 7], None),
    ),
    aten._adaptive_avg_pool2d.default: lambda x: (plane(x), [2, 3]),
    aten.addmv.default: lambda x: (x[:6], rows(x), x[:8]),
    aten.addr.default: lambda x: (rows(x), x[:6], x[:8]),
    aten.affine_grid_generator.default: lambda x: (x[:6].view(1, 2, 3), [1, 1, 3, 4], False),
    aten.col2im.default: lambda x: (x.view(1, 8, 6), [3, 4], [2, 2], [1, 1], [0, 0], [1, 1]),
    **_each(
        (aten.upsample_bicubic2d.default, aten.upsample_bilinear2d.default),
        lambda x: (plane(x), [5, 7], False),
    ),
    **_each(
        (aten.upsample_bicubic2d.vec, aten.upsample_bilinear2d.vec),
        lambda x: (plane(x), [5, 7], True, None),
    ),
    aten.upsample_linear1d.default: lambda x: (line(x), [9], False),
    aten.upsample_trilinear3d.default: lambda x: (space(x), [3, 5, 7], False),
    aten.upsample_trilinear3d.vec: lambda x: (space(x), [3, 5, 7], True, None),
    aten.bucketize.Scalar: lambda x: (0.5, x.sort().values),
    aten.fill.Scalar: lambda x: (rows(x), 2.0),
    aten.zero.default: lambda x: (rows(x),),
    aten.hann_window.default: lambda x: (6,),
    aten.hann_window.periodic: lambda x: (6, False),
    aten.isin.Scalar_Tensor: lambda x: (1.0, x),
    aten.isin.Tensor_Scalar: lambda x: (x, 1.0),
    aten.isin.Tensor_Tensor: lambda x: (x, x[:3]),
    aten.logspace.default: lambda x: (0.0, 2.0, 5),
    aten.tril_indices.default: lambda x: (3, 4),
    aten.triu_indices.default: lambda x: (3, 4),
    aten.lstm.input: lambda x: (
        x.view(4, 3, 4), [x[:9].view(1, 3, 3), x[9:18].view(1, 3, 3)], _cells(12),
        True, 1, 0.0, True, False, False,
    ),
    aten.gru.input: lambda x: _recurrent(x, 9),
    aten.rnn_tanh.input: lambda x: _recurrent(x, 3),
    aten.rnn_relu.input: lambda x: _recurrent(x, 3),
}  # fmt: skip


def _recurrent(x: torch.Tensor, width: int) -> Args:
    first = x[:9].view(1, 3, 3)
    return x.view(4, 3, 4), first, _cells(width), True, 1, 0.0, True, False, False


def _cells(width: int) -> list[torch.Tensor]:
    shapes = ((width, 4), (width, 3), (width,), (width,))
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes]


def _chances(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-700, 700).mul(60).sigmoid()


def weights(x: torch.Tensor) -> torch.Tensor:
    return rows(x).detach().abs().clamp(max=3)


LABELS = torch.tensor([0, 7, -100, 3, 3, 1])
LOSSES: Calls = {
    **_each(
        (aten.mse_loss.default, aten.l1_loss.default),
        lambda x: (rows(x), rows(x).roll(1, 0)),
    ),
    **_each(
        (aten.smooth_l1_loss.default, aten.huber_loss.default),
        lambda x: (rows(x), rows(x).roll(1, 0), 1, 1.0),
    ),
    aten.binary_cross_entropy.default: lambda x: (
        _chances(rows(x)), (rows(x) > 0).double(), weights(x),
    ),
    aten.binary_cross_entropy_with_logits.default: lambda x: (
        rows(x), (rows(x) > 0).double(), None, weights(x)[0],
    ),
    aten.soft_margin_loss.default: lambda x: (rows(x), rows(x).detach().sign()),
    aten.cross_entropy_loss.default: lambda x: (rows(x), LABELS, weights(x)[0], 1, -100, 0.1),
    aten.nll_loss_nd.default: lambda x: (rows(x), LABELS, weights(x)[0]),
    aten.nll_loss.default: lambda x: (rows(x), LABELS),
    aten.nll_loss2d.default: lambda x: (
        x.view(1, 8, 6, 1), LABELS.view(1, 6, 1).where(x[0] > 1e9, torch.tensor(-100)),
    ),
}  # fmt: skip
