"""What may be taken apart above autograd: the table, with the reason why its gradient stays.

Autograd differentiates what it sees. An operator with a derivative of its own that is taken apart
is differentiated piece by piece, and where pieces have no derivative (a distance of 0, a
probability of 1, the corner of a piecewise function) the operator's answer is finite and theirs is
NaN or another number. So only what is named here is taken apart; each row is held against its
operator, forward and backward, also at such points (tests/passes/capture/test_decomposable.py).

Operators that autograd itself looks into (CompositeImplicitAutograd) need no row: their own
definition is what eager mode differentiates.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ringfx.torch_compat.operators import OpOverload

__all__ = ["DECOMPOSABLE"]

aten = torch.ops.aten

MOVES = "it moves elements: its gradient moves them back, however that is written"
LINEAR = "it is linear in each operand: one transpose, whichever way it is written"
NO_GRADIENT = "it has no gradient"
CELLS = "sums, products, sigmoids and tanhs of a recurrence, as autograd would see them"

DECOMPOSABLE: Mapping[OpOverload, str] = {
    **dict.fromkeys(
        (
            aten._reshape_alias.default, aten._unsafe_index.Tensor,
            aten._unsafe_index_put.default, aten.alias_copy.default, aten.as_strided_copy.default,
            aten.block_diag.default, aten.channel_shuffle.default, aten.diag_embed.default,
            aten.diagonal_copy.default, aten.expand_copy.default, aten.lift.default,
            aten.narrow_copy.default, aten.permute_copy.default, aten.pixel_shuffle.default,
            aten.pixel_unshuffle.default, aten.reflection_pad1d.default,
            aten.reflection_pad2d.default, aten.reflection_pad3d.default,
            aten.replication_pad1d.default, aten.replication_pad2d.default,
            aten.replication_pad3d.default, aten.rot90.default, aten.select_scatter.default,
            aten.split_with_sizes_copy.default, aten.squeeze_copy.default, aten.squeeze_copy.dim,
            aten.squeeze_copy.dims, aten.t_copy.default, aten.take.default, aten.trace.default,
            aten.transpose_copy.int, aten.unbind_copy.int, aten.unfold_copy.default,
            aten.unsafe_split.Tensor, aten.unsafe_split_with_sizes.default,
            aten.unsqueeze_copy.default, aten.view_copy.default,
            aten._upsample_nearest_exact1d.default,
            aten._upsample_nearest_exact2d.default, aten._upsample_nearest_exact3d.default,
            aten._upsample_nearest_exact1d.vec, aten._upsample_nearest_exact2d.vec,
            aten._upsample_nearest_exact3d.vec, aten.upsample_nearest1d.default,
            aten.upsample_nearest2d.default, aten.upsample_nearest3d.default,
            aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_nearest3d.vec,
        ),
        MOVES,
    ),
    **dict.fromkeys(
        (
            aten._adaptive_avg_pool2d.default, aten.addmv.default, aten.addr.default,
            aten.affine_grid_generator.default, aten.col2im.default, 
            aten.upsample_bicubic2d.default, aten.upsample_bilinear2d.default,
            aten.upsample_linear1d.default, aten.upsample_trilinear3d.default,
            aten.upsample_bicubic2d.vec, aten.upsample_bilinear2d.vec,
            aten.upsample_trilinear3d.vec,
        ),
        LINEAR,
    ),
    **dict.fromkeys(
        (
            aten.bucketize.Scalar, aten.empty_strided.default, aten.fill.Scalar, aten.fill.Tensor,
            aten.hann_window.default, aten.hann_window.periodic, aten.isin.Scalar_Tensor,
            aten.isin.Tensor_Scalar, aten.isin.Tensor_Tensor, aten.linspace.Scalar_Tensor,
            aten.linspace.Tensor_Scalar, aten.linspace.Tensor_Tensor, aten.logspace.default,
            aten.logspace.Scalar_Tensor, aten.logspace.Tensor_Scalar, aten.logspace.Tensor_Tensor,
            aten.new_empty_strided.default, aten.tril_indices.default, aten.triu_indices.default,
            aten.zero.default,
        ),
        NO_GRADIENT,
    ),
    **dict.fromkeys(
        (
            aten.gru.data, aten.gru.input, aten.lstm.data, aten.lstm.input, aten.rnn_relu.data,
            aten.rnn_relu.input, aten.rnn_tanh.data, aten.rnn_tanh.input,
        ),
        CELLS,
    ),
}  # fmt: skip
"""Operator -> why torch's decomposition of it has the operator's own gradient."""
