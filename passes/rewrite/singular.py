"""Operators whose value or derivative is not finite everywhere: they do not see padding.

A padded row holds what the operators before made of some token, or of none: it may lie where a
logarithm, a root or a quotient has no derivative although no token of the model does. Its own
gradient is 0, and 0 times infinity is NaN in every weight. So it is given one of the rank's tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.fx import Node

from ringfx.comm import conjugate
from ringfx.passes.axes.call import Call
from ringfx.passes.split_modes import LocalCall, Placement, SplitMode
from ringfx.passes.token_axes.token_line import TokenDim

__all__ = ["SINGULAR", "without_padding"]

aten = torch.ops.aten
Arguments = Callable[[Call], tuple[str, ...]]


def _self(call: Call) -> tuple[str, ...]:
    return ("self",)


def _both(call: Call) -> tuple[str, ...]:
    return ("self", "other")


def _divisor(call: Call) -> tuple[str, ...]:
    return ("other",)


def _second(call: Call) -> tuple[str, ...]:
    return ("tensor2",)


def _length(call: Call) -> tuple[str, ...]:
    return ("abs",)


def _power(call: Call) -> tuple[str, ...]:
    """Whole powers from 1 on, as of squares, are smooth."""
    exponent = call["exponent"]
    smooth = isinstance(exponent, (int, float)) and exponent >= 1
    return () if smooth else ("self", "exponent")


def _normalised(call: Call) -> tuple[str, ...]:
    return () if call["eps"] != 0 else ("input",)


SINGULAR: Mapping[object, Arguments] = {
    **dict.fromkeys(
        (
            aten.sqrt.default, aten.rsqrt.default, aten.reciprocal.default, aten.log.default,
            aten.log2.default, aten.log10.default, aten.log1p.default, aten.logit.default,
            aten.acos.default, aten.asin.default, aten.acosh.default, aten.atanh.default,
            aten.lgamma.default, aten.digamma.default, aten.mvlgamma.default,
            aten.polygamma.default, aten.erfinv.default, aten.special_entr.default,
            aten.special_ndtri.default, aten.special_log_ndtr.default,
        ),
        _self,
    ),
    **dict.fromkeys(
        (
            aten.atan2.default, aten.hypot.default, aten.xlogy.Tensor, aten.xlogy.Scalar_Self,
            aten.xlogy.Scalar_Other, aten.special_xlog1py.default, aten.logaddexp.default,
            aten.logaddexp2.default, aten.special_zeta.default,
        ),
        _both,
    ),
    **dict.fromkeys(
        (
            aten.div.Tensor, aten.divide.Tensor, aten.true_divide.Tensor, aten.div.Tensor_mode,
            aten.remainder.Tensor, aten.fmod.Tensor,
        ),
        _divisor,
    ),
    **dict.fromkeys(
        (
            aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.float_power.Tensor_Scalar,
            aten.float_power.Tensor_Tensor,
        ),
        _power,
    ),
    aten.addcdiv.default: _second,
    aten.polar.default: _length,
    **dict.fromkeys((aten.layer_norm.default, aten.group_norm.default), _normalised),
}  # fmt: skip
"""Operator -> the arguments in which padding is replaced."""


def without_padding(call: LocalCall, mode: SplitMode) -> LocalCall:
    """The call on operands that have a token of this rank where they had padding."""
    arguments = SINGULAR.get(call.node.target)
    if arguments is None:
        return call
    operands = list(call.operands)
    for name in arguments(call.call):
        if not isinstance(call.call.get(name), Node):
            continue
        i = call.call.position(name)
        padded = _padded(call, call.call.operands[i])
        if padded is not None and mode.operands[i] is Placement.SHARDED:
            tokens, stored_with = padded
            place = (tokens.dim, tokens.outer, tokens.inner)
            valid = call.local.valid(stored_with)
            operands[i] = call.emit(conjugate.repeat_token, operands[i], valid, *place)
            call.local.holds_tokens(operands[i], tokens)
    return call.with_operands(operands)


def _padded(call: LocalCall, value: Node) -> tuple[TokenDim, TokenDim] | None:
    """How an operand is sharded, and whose tokens it has: the result's, to which it moved."""
    tokens, made = (call.local.lines.token_dim(n) for n in (value, call.node))
    if not isinstance(tokens, TokenDim):
        return None
    holds = made if isinstance(made, TokenDim) and made.line == tokens.line else tokens
    return (tokens, holds) if call.has_padding(holds) else None
