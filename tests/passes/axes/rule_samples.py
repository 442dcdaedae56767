"""Sample calls of every row of the axis table, in sizes that the caller chooses."""

from __future__ import annotations

import torch

from tests.passes.axes.sample import Sample, positive, real, truth, whole
from tests.passes.axes.value_samples import losses, made, matrices, own_derivatives, transforms

__all__ = ["samples"]

aten = torch.ops.aten


def samples(a: int, b: int, c: int, d: int) -> list[Sample]:
    """Calls over dimensions of these sizes, which may be equal or all different."""
    groups = (
        _pointwise(a, b, c),
        _composites(a, b, c),
        _views(a, b, c),
        _parts(a, b, c),
        _products(a, b, c, d),
        _convolutions(a, b, c, d),
        _reductions(a, b, c),
        _along(a, b, c),
        _lookups(a, b, c, d),
        made(a, b, c),
        losses(a, b, c),
        transforms(a, b, c),
        own_derivatives(a, b, c, d),
        matrices(a, b, c),
    )
    return [sample for group in groups for sample in group]


def _pointwise(a: int, b: int, c: int) -> list[Sample]:
    """Some of the many operators that have a row by their tag alone."""
    x, y = real(a, b, c), real(b, c)
    return [
        Sample(aten.add.Tensor, (x, y)),
        Sample(aten.mul.Tensor, (real(a, 1, c), real(b, 1))),
        Sample(aten.gelu.default, (x,)),
        Sample(aten.where.self, (truth(a, 1, c), y, real())),
        Sample(aten.pow.Tensor_Scalar, (x, 2)),
        Sample(aten.clamp.default, (x, -1, 1)),
        Sample(aten.rsqrt.default, (positive(a, b),)),
    ]


def _composites(a: int, b: int, c: int) -> list[Sample]:
    x, y, mask = real(a, b, c), positive(b, c), truth(a, b, c)
    unary = (
        aten.contiguous, aten.clone, aten.alias, aten.detach, aten.lift_fresh_copy, aten.lift_fresh,
        aten.positive, aten.selu, aten.relu6, aten.isfinite, aten.zeros_like, aten.ones_like,
        aten.square, aten.resolve_conj, aten.resolve_neg, aten.nan_to_num, aten.log_sigmoid,
        aten.real, aten.conj,
    )  # fmt: skip
    by_tensor = (
        aten.rsub, aten.true_divide, aten.divide, aten.multiply, aten.subtract, aten.greater,
        aten.greater_equal, aten.less, aten.less_equal, aten.not_equal,
    )  # fmt: skip
    of_bools = (aten.__and__, aten.__or__, aten.__xor__)
    return [
        *(Sample(op.default, (x,)) for op in unary),
        *(Sample(op.Tensor, (x, y)) for op in by_tensor),
        *(Sample(op.Scalar, (x, 0.5)) for op in by_tensor),
        *(Sample(op.Tensor, (mask, truth(b, 1))) for op in of_bools),
        *(Sample(op.Scalar, (whole(9, a, b), 3)) for op in (aten.__and__, aten.__or__)),
        Sample(aten.bitwise_and.Tensor, (mask, truth(b, 1))),
        Sample(aten.imag.default, (torch.complex(x, x),)),
        Sample(aten._conj.default, (torch.complex(x, x),)),
        Sample(aten.complex.default, (x, y.expand(a, b, c))),
        Sample(aten.polar.default, (x.abs(), x)),
        Sample(aten.to.dtype, (x, torch.float32)),
        Sample(aten.to.device, (x, torch.device("cpu"), torch.float32)),
        Sample(aten.to.dtype_layout, (x,), {"dtype": torch.float32}),
        Sample(aten.to.other, (x, real(c))),
        Sample(aten._to_copy.default, (x,), {"dtype": torch.float32}),
        Sample(aten.type_as.default, (x, torch.zeros(c))),
        Sample(aten.where.ScalarOther, (mask, x, 0.0)),
        Sample(aten.where.ScalarSelf, (mask, 0.0, x)),
        Sample(aten.where.Scalar, (mask, 0.0, 1.0)),
        Sample(aten.masked_fill.Scalar, (x, truth(b, 1), 0.0)),
        Sample(aten.masked_fill.Tensor, (x, truth(b, 1), real())),
        Sample(aten.float_power.Tensor_Scalar, (x, 2)),
        Sample(aten.float_power.Tensor_Tensor, (x.abs(), y)),
        Sample(aten.full_like.default, (x, 3.0)),
        Sample(aten.empty_like.default, (x,)),
        Sample(aten.expand_as.default, (real(b, 1), x)),
        Sample(aten.copy.default, (x, y)),
        Sample(aten.floor_divide.default, (x, y)),
        Sample(aten.floor_divide.Scalar, (x, 2)),
        Sample(aten.addcmul.default, (x, y, real(c))),
        Sample(aten.isclose.default, (x, x + 1)),
        Sample(aten.clip.default, (x, -1, 1)),
        Sample(aten.dropout.default, (x, 0.5, False)),
        Sample(aten.dropout.default, (x, 0.0, True)),
        Sample(aten.dropout.default, (x, 0.5, True)),
    ]


def _views(a: int, b: int, c: int) -> list[Sample]:
    x = real(a, b, c)
    flat = real(a, b * c)
    return [
        Sample(aten.view.default, (flat, [a, b, c])),
        Sample(aten.view.default, (x, [a * b, c])),
        Sample(aten.reshape.default, (x, [a, 1, b * c])),
        Sample(aten.reshape.default, (real(a * b, c), [a, b * c])),
        Sample(aten._unsafe_view.default, (x, [-1, c])),
        Sample(aten.flatten.using_ints, (x, 1, 2)),
        Sample(aten.unflatten.int, (flat, 1, [b, c])),
        Sample(aten.squeeze.default, (real(a, 1, b),)),
        Sample(aten.squeeze.dim, (real(a, 1, b), 1)),
        Sample(aten.squeeze.dim, (x, 1)),
        Sample(aten.squeeze.dims, (real(1, a, 1, b), [0, 2])),
        Sample(aten.view_as.default, (flat, x)),
        Sample(aten.reshape_as.default, (x, flat)),
        Sample(aten.ravel.default, (x,)),
        Sample(aten.atleast_1d.default, (x,)),
        Sample(aten.atleast_2d.default, (real(a),)),
        Sample(aten.permute.default, (x, [2, 0, 1])),
        Sample(aten.permute.default, (x, [-2, -1, 0])),
        Sample(aten.transpose.int, (x, 1, -1)),
        Sample(aten.swapaxes.default, (x, 0, 2)),
        Sample(aten.swapdims.default, (x, 0, -1)),
        Sample(aten.t.default, (real(a, b),)),
        Sample(aten.t.default, (real(a),)),
        Sample(aten.mT.default, (x,)),
        Sample(aten.adjoint.default, (x,)),
        Sample(aten.numpy_T.default, (x,)),
        Sample(aten.movedim.int, (x, 0, 2)),
        Sample(aten.movedim.int, (real(a, b, c, 2), -1, 1)),
        Sample(aten.movedim.intlist, (x, [0, 1], [2, 0])),
        Sample(aten.moveaxis.int, (x, -1, 0)),
        Sample(aten.moveaxis.intlist, (x, [2, 0], [0, 1])),
        Sample(aten.unsqueeze.default, (x, 1)),
        Sample(aten.unsqueeze.default, (x, -1)),
        Sample(aten.expand.default, (real(a, 1, c), [b, a, b, c])),
        Sample(aten.expand.default, (real(a, 1, c), [-1, b, -1])),
        Sample(aten.repeat.default, (real(a, b), [2, 3, 1])),
        Sample(aten.repeat_interleave.self_int, (x, 2, 1)),
        Sample(aten.repeat_interleave.self_int, (x, 2), splits=False),
        Sample(aten.repeat_interleave.self_Tensor, (x, whole(3, b), 1)),
    ]


def _parts(a: int, b: int, c: int) -> list[Sample]:
    x = real(a, b, c)
    return [
        Sample(aten.slice.Tensor, (x, 1, 0, b)),
        Sample(aten.slice.Tensor, (x, 1, 1, -1)),
        Sample(aten.slice.Tensor, (x, -1, -3, 9223372036854775807)),
        Sample(aten.slice.Tensor, (x, 0, 0, a, 2)),
        Sample(aten.slice.Tensor, (x, 1, 2, 3)),
        Sample(aten.slice.Tensor, (x, 1, -1, 9223372036854775807)),
        Sample(aten.narrow.default, (x, 1, 0, b)),
        Sample(aten.narrow.default, (x, -1, 1, 2)),
        Sample(aten.split.Tensor, (x, 2, 1)),
        Sample(aten.split_with_sizes.default, (x, [1, b - 1], 1)),
        Sample(aten.split_with_sizes.default, (x, [b], 1)),
        Sample(aten.split.Tensor, (x, b, 1)),
        Sample(aten.chunk.default, (x, 2, -1)),
        Sample(aten.chunk.default, (x, 1, 1)),
        Sample(aten.tensor_split.sections, (x, 2, 1)),
        Sample(aten.select.int, (x, 1, -1)),
        Sample(aten.select.int, (x, -1, 2)),
        Sample(aten.unbind.int, (x, 1)),
        Sample(aten.cat.default, ([x, real(a, 2, c), real(a, 1, c)], 1)),
        Sample(aten.cat.default, ([x], 1)),
        Sample(aten.concat.default, ([x, x], -1)),
        Sample(aten.stack.default, ([x, x], 1)),
        Sample(aten.stack.default, ([x], -1)),
        Sample(aten.pad.default, (x, [0, 0, 1, 2])),
        Sample(aten.pad.default, (x, [1, -1])),
        Sample(aten.constant_pad_nd.default, (x, [0, 1], 0.5)),
    ]


def _products(a: int, b: int, c: int, d: int) -> list[Sample]:
    x = real(a, b, c)
    return [
        Sample(aten.linear.default, (x, real(d, c))),
        Sample(aten.linear.default, (x, real(d, c), real(d))),
        Sample(aten.linear.default, (x, real(c))),
        Sample(aten.linear.default, (real(c), real(c))),
        Sample(aten.linear.default, (x, real(c), real())),
        Sample(aten.matmul.default, (x, real(c, d))),
        Sample(aten.matmul.default, (real(a, 1, b, c), real(d, c, b))),
        Sample(aten.matmul.default, (x, real(c))),
        Sample(aten.matmul.default, (real(c), real(a, c, d))),
        Sample(aten.matmul.default, (real(c), real(c))),
        Sample(aten.mm.default, (real(a, b), real(b, c))),
        Sample(aten.bmm.default, (x, real(a, c, d))),
        Sample(aten.mv.default, (real(a, b), real(b))),
        Sample(aten._cdist_forward.default, (x, real(a, d, c), 2.0, None)),
        Sample(aten.addmm.default, (real(c), real(a, b), real(b, c))),
        Sample(aten.addmm.default, (real(a, 1), real(a, b), real(b, c))),
        Sample(aten.baddbmm.default, (real(a, b, d), x, real(a, c, d))),
        Sample(aten.baddbmm.default, (real(1, 1, d), x, real(a, c, d))),
        Sample(aten.einsum.default, ("abc, dc -> abd", [x, real(d, c)])),
        Sample(aten.einsum.default, ("ab,b->a", [real(a, b), real(b)])),
        Sample(aten.einsum.default, ("ab,c->b", [real(a, b), real(c)])),
        Sample(aten.einsum.default, ("...c,dc->...d", [x, real(d, c)])),
        Sample(aten.outer.default, (real(a), real(b))),
    ]


def _convolutions(a: int, b: int, c: int, d: int) -> list[Sample]:
    line, point = real(a, b, c), real(d, b, 1)
    plane = real(a, 2, b, c)
    return [
        Sample(aten.conv1d.default, (line, point, real(d))),
        Sample(aten.conv1d.default, (line, real(d, b, 3), None, [1], [1])),
        Sample(aten.conv1d.padding, (line, real(d, b, 3), None, [1], "same")),
        Sample(aten.conv1d.default, (line, real(b, 1, 3), None, [1], [1], [1], b)),
        Sample(aten.conv1d.default, (line, point, None, [1], [1])),
        Sample(aten.conv2d.default, (plane, real(d, 2, 1, 3), real(d))),
        Sample(aten.im2col.default, (plane, [1, 3], [1, 1], [0, 1], [1, 1])),
        Sample(aten.conv2d.padding, (plane, real(d, 2, 1, 3), real(d), [1], "same")),
        Sample(aten.conv2d.default, (plane, real(d, 2, 2, 2), None, [2, 2])),
        Sample(aten.conv3d.default, (real(a, 2, b, c, 4), real(d, 2, 1, 2, 1))),
        Sample(aten.convolution.default, (line, point, real(d), [1], [0], [1], False, [0], 1)),
        Sample(
            aten.convolution.default,
            (line, real(b, d, 1), real(d), [1], [0], [1], True, [0], 1),
        ),
    ]


def _reductions(a: int, b: int, c: int) -> list[Sample]:
    x = real(a, b, c)
    of_all = (
        aten.sum, aten.mean, aten.max, aten.min, aten.prod, aten.any, aten.all, aten.argmax,
        aten.argmin, aten.var, aten.amax, aten.amin, aten.linalg_vector_norm,
    )  # fmt: skip
    along = (
        aten.max.dim, aten.min.dim, aten.prod.dim_int, aten.any.dim, aten.all.dim,
        aten.argmax.default, aten.argmin.default,
    )  # fmt: skip
    over = (
        aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default,
        aten.count_nonzero.dim_IntList, aten.logsumexp.default, aten.var.dim, aten.std.dim,
        aten.var.correction, aten.std.correction, aten.var_mean.correction,
    )  # fmt: skip
    return [
        *(Sample(op.default, (x,), splits=op in (aten.sum, aten.mean)) for op in of_all),
        *(Sample(op, (x, 1)) for op in along),
        *(Sample(op, (x, [1])) for op in over),
        Sample(aten.sum.dim_IntList, (x, [0, -1], True)),
        Sample(aten.sum.dim_IntList, (truth(a, b), [1])),
        Sample(aten.mean.dim, (x, [0, -1], True)),
        Sample(aten.mean.dim, (x, [1]), {"dtype": torch.float32}),
        Sample(aten.linalg_vector_norm.default, (x, 2, [1])),
        Sample(aten.norm.ScalarOpt_dim, (x, 2, [1], True)),
        Sample(aten.norm.Scalar, (x, 2)),
    ]


def _along(a: int, b: int, c: int) -> list[Sample]:
    x = real(a, b, c)
    return [
        Sample(aten.softmax.int, (x, -1)),
        Sample(aten._softmax.default, (x, 1, False)),
        Sample(aten._safe_softmax.default, (x, -1)),
        Sample(aten.log_softmax.int, (x, 1)),
        Sample(aten._log_softmax.default, (x, -1, False)),
        Sample(aten.cumsum.default, (x, 1)),
        Sample(aten.cumprod.default, (x, -1)),
        Sample(aten.logcumsumexp.default, (x, 1)),
        Sample(aten.cummax.default, (x, 1)),
        Sample(aten.cummin.default, (x, -1)),
        Sample(aten.median.dim, (x, 1)),
        Sample(aten.nanmedian.dim, (x, -1, True)),
        Sample(aten.median.default, (x,), splits=False),
        Sample(aten.nanmedian.default, (x,), splits=False),
        Sample(aten.kthvalue.default, (x, 2, 1)),
        Sample(aten.mode.default, (x, 1)),
        Sample(aten.sort.default, (x, 1)),
        Sample(aten.sort.stable, (x,), {"stable": True, "dim": 0}),
        Sample(aten.argsort.default, (x, -1)),
        Sample(aten.argsort.stable, (x,), {"stable": True}),
        Sample(aten.histc.default, (x, 5, -1, 1)),
        Sample(aten.bincount.default, (whole(c, a),), splits=False),
        Sample(aten.topk.default, (x, 2, 1)),
        Sample(aten.diff.default, (x, 1, 1)),
        Sample(aten.fft_fft.default, (x, None, 1)),
        Sample(aten.avg_pool2d.default, (real(a, b, 6, 4), [3, 2], [1, 2], [1, 0])),
        Sample(aten.avg_pool3d.default, (real(a, b, 2, 6, 4), [2, 3, 2])),
        Sample(aten.fft_ifft.default, (x,)),
        Sample(aten.fft_rfft.default, (x, None, -1)),
        Sample(aten.fft_irfft.default, (torch.complex(x, x), None, 1)),
        Sample(aten.fft_fft2.default, (x,)),
        Sample(aten.fft_ifft2.default, (x,)),
        Sample(aten.fft_fftn.default, (x, [5, 4])),
        Sample(aten.fft_ifftn.default, (x, None, [0, 2])),
        Sample(aten.fft_rfftn.default, (x, None, [1, 2])),
        Sample(aten.fft_irfftn.default, (torch.complex(x, x), None, [1, 2])),
        Sample(aten.flip.default, (x, [1])),
        Sample(aten.roll.default, (x, [1], [1])),
        Sample(aten.roll.default, (x, [1]), splits=False),
        Sample(aten.unfold.default, (x, 1, 3, 2)),
        Sample(aten.unfold.default, (x, -1, 2, 1)),
        Sample(aten.tril.default, (x,)),
        Sample(aten.triu.default, (x, 1)),
        Sample(aten.layer_norm.default, (x, [c], real(c), real(c))),
        Sample(aten.layer_norm.default, (x, [b, c])),
        Sample(aten.rms_norm.default, (x, [c], real(c))),
        Sample(aten.group_norm.default, (real(a, 6, c), 2, real(6), real(6))),
    ]


def _lookups(a: int, b: int, c: int, d: int) -> list[Sample]:
    x = real(a, b, c)
    return [
        Sample(aten.embedding.default, (real(d, c), whole(d, a, b))),
        Sample(aten.index_select.default, (x, 1, whole(b, d))),
        Sample(aten.index.Tensor, (x, [whole(a, d)])),
        Sample(aten.index.Tensor, (x, [None, whole(b, d, 1), whole(c, 3)])),
        Sample(aten.index.Tensor, (x, [whole(a, d), None, whole(c, d)])),
        Sample(aten.index.Tensor, (x, [truth(a, b)]), splits=False),
        Sample(aten.gather.default, (x, 1, whole(b, a, d, c))),
        Sample(aten.gather.default, (x, 2, whole(c, a, b - 1, 3))),
        Sample(aten.take_along_dim.default, (x, whole(b, a, d, c), 1)),
        Sample(aten.take_along_dim.default, (x, whole(b, 1, d, c), 1)),
        Sample(aten.take_along_dim.default, (x, whole(4, d))),
        Sample(aten.one_hot.default, (whole(d, a, b), d)),
        Sample(aten.bucketize.Tensor, (x, real(d).sort().values)),
        Sample(aten.searchsorted.Tensor, (real(d).sort().values, x)),
        Sample(aten.searchsorted.Tensor, (real(a, d), real(a, b)), splits=False),
        Sample(aten.diagonal.default, (x,), splits=False),
        Sample(aten.view_as_complex.default, (real(a, b, 2),)),
        Sample(aten.view_as_real.default, (torch.complex(real(a, b), real(a, b)),)),
        Sample(aten.diagonal_scatter.default, (real(a, b), real(min(a, b))), splits=False),
        Sample(aten.slice_scatter.default, (x, real(a, 2, c), 1, 1, 3)),
        Sample(aten.index_copy.default, (x, 1, whole(b, 2), real(a, 2, c))),
        Sample(aten.index_fill.int_Scalar, (x, 1, whole(b, 2), 1.0)),
        Sample(aten.index_fill.int_Tensor, (x, 1, whole(b, 2), real())),
        Sample(aten.masked_scatter.default, (x, truth(a, b, c), real(a * b * c)), splits=False),
        Sample(aten.put.default, (x, whole(a, 3), real(3)), splits=False),
        Sample(aten.index_put.default, (x, [None, whole(b, d)], real(a, d, c))),
        Sample(aten.index_put.default, (x, [whole(a, d), whole(b, d)], real(c), True)),
        Sample(aten.index_add.default, (x, 1, whole(b, d), real(a, d, c))),
        Sample(aten.scatter.value, (x, 1, whole(b, a, d, c), 2.0)),
        Sample(aten.scatter.src, (x, -1, whole(c, a, b, 1), real(a, b, 1))),
        Sample(aten.scatter_add.default, (x, 0, whole(a, a, b, c), real(a, b, c))),
        Sample(aten.scatter.reduce, (x, 1, whole(b, a, 1, c), real(a, 1, c)), {"reduce": "add"}),
        Sample(aten.scatter_reduce.two, (x, 1, whole(b, a, d, c), real(a, d, c), "amax")),
    ]
