"""Operators whose value or derivative is not finite everywhere: they do not see padding.

A padded row holds what the operators before made of some token, or of none: it may lie where a
logarithm, a root or a quotient has no derivative although no token of the model does. Its own
gradient is 0, and 0 times infinity is NaN in every weight. So it is given one of the rank's tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Graph, Node

from ringfx.comm import conjugate
from ringfx.passes.axes.call import Call
from ringfx.passes.place import Placement
from ringfx.passes.place.split_modes import Form, Split
from ringfx.passes.rewrite.crossings import Crossings
from ringfx.passes.token_axes import Carried

__all__ = ["SINGULAR", "without_padding"]

aten = torch.ops.aten
Arguments = Callable[[Call], tuple[str, ...]]


def _self(call: Call) -> tuple[str, ...]:
    return ("self",)


def _both(call: Call) -> tuple[str, ...]:
    return ("self", "other")


def _divisor(call: Call) -> tuple[str, ...]:
    return ("other",)


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
    **dict.fromkeys((aten.layer_norm.default, aten.group_norm.default), _normalised),
}  # fmt: skip
"""Operator -> the arguments in which padding is replaced."""


def without_padding(
    graph: Graph,
    placement: Placement,
    node: Node,
    mode: Split,
    operands: list[Node],
    crossings: Crossings,
) -> list[Node]:
    """The operands, a token of this rank where they held padding."""
    arguments = SINGULAR.get(node.target)
    if arguments is None:
        return operands
    call, result = Call(node), list(operands)
    for name in arguments(call):
        if not isinstance(call.get(name), Node):
            continue
        i = call.position(name)
        where = _padded(placement, node, call.operands[i])
        if where is not None and mode.operands[i] is Form.SPLIT:
            carried, member_of = where
            place = (carried.dim, carried.outer, carried.inner)
            args: tuple[Any, ...] = (operands[i], crossings.valid(member_of), *place)
            result[i] = graph.call_function(conjugate.repeat_token, args)
    return result


def _padded(placement: Placement, node: Node, value: Node) -> tuple[Carried, Carried] | None:
    """How an operand is split, and whose tokens it holds: the result's, to which it moved."""
    carried, made = placement.lines.carried(value), placement.lines.carried(node)
    if not isinstance(carried, Carried):
        return None
    holds = made if isinstance(made, Carried) and made.line == carried.line else carried
    line = placement.lines.lines[holds.line]
    return (carried, holds) if line.has_padding(holds.member) else None
