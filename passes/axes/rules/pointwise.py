"""Operators that act on each element alone, with broadcasting."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ringfx.passes.axes.call import AxisRule, Call, Labels, OpAxes
from ringfx.passes.axes.how import Draw
from ringfx.passes.axes.rules.pattern import shares
from ringfx.torch_compat.operators import OpOverload

__all__ = ["RULES", "broadcast", "elementwise"]

aten = torch.ops.aten


def elementwise(call: Call) -> OpAxes:
    """Every operand broadcasts to the result."""
    result = call.result_shape
    return OpAxes(
        operands=tuple(broadcast(shape, result) for shape in call.shapes),
        results=tuple(broadcast(shape, result) for shape in call.result_shapes),
    )


def broadcast(shape: Sequence[int], result: Sequence[int]) -> Labels:
    """Labels ``d0, d1, ...`` of the result's dimensions, aligned to the right."""
    skipped = len(result) - len(shape)
    return tuple((f"d{i + skipped}",) if size != 1 else () for i, size in enumerate(shape))


def random_elementwise(call: Call) -> OpAxes:
    """One random draw for the whole tensor: every split draws what the unsplit model does."""
    axes = elementwise(call)
    tensors = [t for t in (*axes.operands, *axes.results) if t is not None]
    every = {label for dims in tensors for dim in dims for label in dim}
    return OpAxes(
        operands=axes.operands,
        results=axes.results,
        share=shares(needs_all=sorted(every)),
        reason="its random draws are those of the whole tensor",
    )


def drawn(call: Call) -> OpAxes:
    """Random numbers in the shape of the operand, whatever it holds."""
    return dataclasses.replace(elementwise(call), how=Draw())


def crossed(call: Call) -> OpAxes:
    """Products of three coordinates of two points."""
    axes, at = elementwise(call), call.dim("dim", len(call.result_shape))
    return dataclasses.replace(
        axes, share=shares(needs_all=[f"d{at}"]), reason="it mixes the coordinates along the axis"
    )


def dropout(call: Call) -> OpAxes:
    """The identity when it drops nothing."""
    identity = not call["train"] or call["p"] == 0
    return elementwise(call) if identity else drawn(call)


_COMPOSITES = (
    aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other,
    aten._to_copy.default, aten.contiguous.default, aten.clone.default, aten.alias.default,
    aten.detach.default, aten.lift_fresh_copy.default, aten.lift_fresh.default,
    aten.type_as.default, aten.positive.default, aten.__and__.Tensor, aten.__or__.Tensor,
    aten.__xor__.Tensor, aten.__and__.Scalar, aten.__or__.Scalar, aten.where.ScalarOther,
    aten.where.ScalarSelf, aten.where.Scalar, aten.masked_fill.Scalar, aten.masked_fill.Tensor,
    aten.selu.default, aten.relu6.default, aten.isfinite.default, aten.float_power.Tensor_Scalar,
    aten.float_power.Tensor_Tensor, aten.zeros_like.default, aten.ones_like.default,
    aten.full_like.default, aten.empty_like.default, aten.rsub.Scalar, aten.rsub.Tensor,
    aten.square.default, aten.expand_as.default, aten.resolve_conj.default,
    aten.resolve_neg.default, aten.real.default, aten.imag.default, aten.conj.default,
    aten._conj.default, aten.nan_to_num.default, aten.copy.default, aten.true_divide.Tensor,
    aten.true_divide.Scalar, aten.floor_divide.default,
    aten.floor_divide.Scalar, aten.divide.Tensor, aten.divide.Scalar, aten.multiply.Tensor,
    aten.multiply.Scalar, aten.subtract.Tensor, aten.subtract.Scalar, aten.addcmul.default,
    aten.greater.Tensor, aten.greater.Scalar, aten.greater_equal.Tensor,
    aten.greater_equal.Scalar, aten.less.Tensor, aten.less.Scalar, aten.less_equal.Tensor,
    aten.less_equal.Scalar, aten.not_equal.Tensor, aten.not_equal.Scalar, aten.isclose.default,
    aten.bitwise_and.Tensor, aten.clip.default, aten.log_sigmoid.default, aten.polar.default,
    aten.complex.default, aten.hardswish.default, aten._prelu_kernel.default,
)  # fmt: skip

RULES: dict[OpOverload, AxisRule] = {
    **dict.fromkeys(_COMPOSITES, elementwise),
    aten.dropout.default: dropout,
    aten.linalg_cross.default: crossed,
    **dict.fromkeys(
        (
            aten.bernoulli.Tensor, aten.binomial.default, aten.normal.Tensor_float,
            aten.normal.Tensor_Tensor, aten.normal.float_Tensor, aten.poisson.default,
            aten.native_dropout.default, aten.rrelu_with_noise_functional.default,
            aten._standard_gamma.default,
        ),
        random_elementwise,
    ),
    **dict.fromkeys(
        (
            aten.rand_like.default, aten.randn_like.default, aten.randint_like.default,
            aten.randint_like.low_dtype, aten.bernoulli.p, aten.uniform.default,
            aten.normal_functional.default, aten.exponential.default, aten.cauchy.default,
            aten.geometric.default, aten.log_normal.default, aten.random.default, aten.random.to,
        ),
        drawn,
    ),
}  # fmt: skip
