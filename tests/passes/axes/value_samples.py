"""Sample calls of rows that make values: creation, losses, transforms, own derivatives."""

from __future__ import annotations

from typing import Any

import torch

from tests.passes.axes.sample import Sample, positive, real, truth, whole

__all__ = ["losses", "made", "own_derivatives", "transforms"]

aten = torch.ops.aten


def made(a: int, b: int, c: int) -> list[Sample]:
    x = real(a, b, c)
    sized = (aten.zeros.default, aten.ones.default, aten.rand.default, aten.randn.default)
    like = (aten.new_zeros.default, aten.new_ones.default, aten.new_empty.default)
    return [
        *(Sample(op, ([a, b],)) for op in sized),
        *(Sample(op, (x, [a, b])) for op in like),
        Sample(aten.full.default, ([a, b], 2.0)),
        Sample(aten.new_full.default, (x, [a, b], 2.0)),
        Sample(aten.scalar_tensor.default, (2.0,)),
        Sample(aten.arange.default, (a,)),
        Sample(aten.arange.start, (1, a)),
        Sample(aten.arange.start_step, (0, a, 2)),
        Sample(aten.linspace.default, (0, 1, a)),
        Sample(aten.eye.default, (a,)),
        Sample(aten.eye.m, (a, b)),
        Sample(aten.rand_like.default, (x,)),
        Sample(aten.randn_like.default, (x,)),
        Sample(aten.randint_like.default, (x, 9)),
        Sample(aten.randint_like.low_dtype, (x, 2, 9)),
        Sample(aten.uniform.default, (x,)),
        Sample(aten.normal_functional.default, (x,)),
        Sample(aten.exponential.default, (x,)),
        Sample(aten.cauchy.default, (x,)),
        Sample(aten.geometric.default, (x, 0.3)),
        Sample(aten.log_normal.default, (x,)),
        Sample(aten.random.default, (x,)),
        Sample(aten.random.to, (x, 9)),
        Sample(aten.randint.default, (9, [a, b])),
        Sample(aten.randint.low, (1, 9, [a, b])),
        Sample(aten.randperm.default, (a,)),
        Sample(aten.bernoulli.default, (x.sigmoid(),)),
        Sample(aten.bernoulli.p, (x, 0.5)),
        Sample(aten.empty.memory_format, ([a, b],)),
    ]


def losses(a: int, b: int, c: int) -> list[Sample]:
    """Each with no reduction, as a mean (which capture writes as sum / count), and as a sum."""
    entropy = aten.cross_entropy_loss.default
    elementwise = (aten.mse_loss, aten.l1_loss, aten.smooth_l1_loss, aten.huber_loss)
    calls: list[tuple[Any, ...]] = []
    for reduction in (0, 1, 2):
        calls += [
            (reduction, entropy, real(a, c), whole(c, a), None, reduction),
            (reduction, entropy, real(a, c, b), whole(c, a, b), positive(c), reduction, 1, 0.1),
            (reduction, entropy, real(a, c), real(a, c).softmax(1), None, reduction),
            *(
                (reduction, op.default, real(a, c), whole(c, a), positive(c), reduction, 1)
                for op in (aten.nll_loss_nd, aten.nll_loss)
            ),
            (reduction, aten.nll_loss_nd.default, real(a, c, b), whole(c, a, b), None, reduction),
            (
                reduction,
                aten.nll_loss2d.default,
                real(a, c, b, 2),
                whole(c, a, b, 2),
                None,
                reduction,
                1,
            ),
            *((reduction, op.default, real(a, b), real(a, b), reduction) for op in elementwise),
            (reduction, aten.mse_loss.default, real(a, b), real(b), reduction),
        ]
    return [Sample(op, tuple(args), splits=reduction != 1) for reduction, op, *args in calls]


def transforms(a: int, b: int, c: int) -> list[Sample]:
    x, pairs = real(a, b, c), torch.complex(real(a, b, c), real(a, b, c))
    one = (aten.fft_fft, aten.fft_ifft, aten.fft_rfft, aten.fft_irfft, aten.fft_hfft)
    two = (aten.fft_fft2, aten.fft_ifft2, aten.fft_rfft2, aten.fft_irfft2)
    many = (aten.fft_fftn, aten.fft_ifftn, aten.fft_rfftn, aten.fft_irfftn)
    return [
        *(Sample(op.default, (x, None, 1)) for op in one),
        Sample(aten.fft_ihfft.default, (x,)),
        *(Sample(op.default, (x,)) for op in two),
        *(Sample(op.default, (x, [4])) for op in many),
        *(Sample(op.default, (x, None, [0, -1])) for op in many),
        *(Sample(op.default, (x,), splits=False) for op in many),
        Sample(aten.fft_fftshift.default, (x, [1])),
        Sample(aten.fft_ifftshift.default, (x, [0, 2])),
        Sample(aten._fft_c2c.default, (pairs, [1], 0, True)),
        Sample(aten._fft_r2c.default, (x, [0, 1], 0, True)),
        Sample(aten._fft_c2r.default, (pairs, [2], 0, 2 * c - 2)),
    ]


def own_derivatives(a: int, b: int, c: int, d: int) -> list[Sample]:
    """Operators that would lose their own derivative if they were taken apart."""
    x, plane = real(a, b, c), real(a, b, 6, 4)
    places = aten.max_pool2d_with_indices.default(plane, [2, 2])[1]
    space = real(a, b, 2, 6, 4)
    ordered = aten.max_pool3d_with_indices.default(space, [2, 2, 2])[1]
    chances, truths = real(a, b).sigmoid(), truth(a, b).double()
    whole_rows = (aten.multi_margin_loss.default, aten.multilabel_margin_loss_forward.default)
    logs, lengths = real(c, a, 5).log_softmax(-1), [c] * a
    return [
        Sample(aten.hardswish.default, (x,)),
        Sample(aten._prelu_kernel.default, (x, real(b, 1))),
        Sample(aten.linalg_cross.default, (real(a, b, 3), real(1, b, 3))),
        Sample(aten.glu.default, (real(a, b, 4),)),
        Sample(aten._euclidean_dist.default, (x, real(a, d, c))),
        Sample(aten.dot.default, (real(a), real(a))),
        Sample(aten.vdot.default, (real(a), real(a))),
        Sample(aten.grid_sampler_2d.default, (plane, real(a, b, c, 2), 0, 0, False)),
        Sample(aten.grid_sampler_3d.default, (space, real(a, b, c, 2, 3), 0, 0, False)),
        Sample(aten.count_nonzero.default, (x,)),
        Sample(aten.nansum.default, (x, [1])),
        Sample(aten.all.dims, (truth(a, b, c), [1])),
        Sample(aten.any.dims, (truth(a, b, c), [1])),
        Sample(aten.aminmax.default, (x,), {"dim": 1}),
        Sample(aten.std_mean.correction, (x, [1])),
        Sample(aten.norm.ScalarOpt_dtype, (x, 2), {"dtype": torch.float64}, splits=False),
        Sample(aten.norm.ScalarOpt_dim_dtype, (x, 2, [1], True), {"dtype": torch.float64}),
        Sample(aten.renorm.default, (x, 2, 1, 0.5)),
        Sample(aten.max_pool2d_with_indices.default, (plane, [2, 2])),
        Sample(aten.max_pool3d_with_indices.default, (space, [2, 2, 2])),
        Sample(aten.adaptive_max_pool2d.default, (plane, [3, 2])),
        Sample(aten.adaptive_max_pool3d.default, (space, [2, 3, 2])),
        Sample(aten._adaptive_avg_pool3d.default, (space, [2, 3, 2])),
        Sample(aten.max_unpool2d.default, (real(a, b, 3, 2), places, [6, 4])),
        Sample(
            aten.max_unpool3d.default, (real(a, b, 1, 3, 2), ordered, [2, 6, 4], [2] * 3, [0] * 3)
        ),
        *(
            Sample(op.default, (given, truths, *more, reduction), splits=reduction != 1)
            for reduction in (0, 1, 2)
            for op, given, more in (
                (aten.binary_cross_entropy, chances, (positive(b),)),
                (aten.binary_cross_entropy_with_logits, real(a, b), (positive(b), positive(b))),
                (aten.soft_margin_loss, real(a, b), ()),
            )
        ),
        Sample(aten._pdist_forward.default, (real(a, b),), splits=False),
        Sample(aten.as_strided_scatter.default, (x, real(2), [2], [1]), splits=False),
        Sample(aten.dist.default, (x, real(b, c)), splits=False),
        Sample(aten.multinomial.default, (positive(a, b), 2), splits=False),
        Sample(whole_rows[0], (real(a, b), whole(b, a)), splits=False),
        Sample(whole_rows[1], (real(a, b), whole(b, a, b), 0), splits=False),
        Sample(aten._ctc_loss.default, (logs, whole(4, a, 2) + 1, lengths, [1] * a), splits=False),
        Sample(
            aten._ctc_loss.Tensor,
            (logs, whole(4, a, 2) + 1, torch.tensor(lengths), torch.tensor([1] * a)),
            splits=False,
        ),
        Sample(aten.bernoulli.Tensor, (x, x.sigmoid()), splits=False),
        Sample(aten.binomial.default, (positive(a) * 4, positive(a).clamp(max=1)), splits=False),
        Sample(aten.poisson.default, (positive(a, b),), splits=False),
        Sample(aten._standard_gamma.default, (positive(a, b),), splits=False),
        Sample(aten.normal.Tensor_float, (x, 1.0), splits=False),
        Sample(aten.normal.float_Tensor, (0.0, positive(a, b)), splits=False),
        Sample(aten.normal.Tensor_Tensor, (x, positive(b, c)), splits=False),
        Sample(aten.native_dropout.default, (x, 0.5, True), splits=False),
        Sample(aten.rrelu_with_noise_functional.default, (x, x, 0.1, 0.3, True), splits=False),
    ]


def matrices(a: int, b: int, c: int) -> list[Sample]:
    """Functions of each matrix of a batch, and equations with many right-hand sides."""
    x = real(a, b, 5, 5)
    square = x @ x.mT + torch.eye(5, dtype=x.dtype)
    lower = aten.linalg_cholesky.default(square)
    of_each = (
        aten.linalg_inv, aten.linalg_inv_ex, aten.inverse, aten.linalg_pinv, aten.pinverse,
        aten.linalg_cholesky, aten.linalg_cholesky_ex,
        aten.cholesky, aten.linalg_eigh, aten._linalg_eigh, aten.linalg_eigvalsh, aten.linalg_det,
        aten.det, aten.linalg_slogdet, aten.slogdet, aten.logdet,
    )  # fmt: skip
    of_any = (aten.linalg_qr, aten.linalg_svd, aten._linalg_svd, aten.linalg_svdvals)
    more = {aten.linalg_pinv: (1e-9,)}
    return [
        *(Sample(op.default, (square, *more.get(op, ()))) for op in of_each),
        *(Sample(op.default, (real(a, b, 5, 3),)) for op in of_any),
        Sample(aten.linalg_pinv.atol_rtol_float, (real(a, b, 5, 3),)),
        Sample(aten.linalg_matrix_power.default, (square, 3)),
        Sample(aten.matrix_power.default, (square, -2)),
        Sample(aten.linalg_solve.default, (square, real(a, b, 5, c))),
        Sample(aten.linalg_solve.default, (square, real(a, b, 5))),
        Sample(aten.linalg_solve.default, (square, real(a, b, c, 5)), {"left": False}),
        Sample(aten.linalg_solve_triangular.default, (lower, real(b, 5, c)), {"upper": False}),
        Sample(
            aten.linalg_solve_triangular.default,
            (lower, real(a, 1, c, 5)),
            {"upper": False, "left": False},
        ),
        Sample(aten.cholesky_solve.default, (real(a, b, 5, c), lower)),
    ]
