"""Operators with a derivative of their own that need all of every axis."""

from __future__ import annotations

import torch

from ringfx.passes.axes.call import AxisRule, Call, Labels, OpAxes
from ringfx.passes.axes.rules.pattern import shares
from ringfx.torch_compat.operators import OpOverload

__all__ = ["RULES"]

aten = torch.ops.aten


def gathered(reason: str) -> AxisRule:
    """Every operand replicated, every result new; plans list it with the reason."""

    def rule(call: Call) -> OpAxes:
        results: tuple[Labels, ...] = tuple(
            tuple((f"r{n}.{i}",) if size != 1 else () for i, size in enumerate(shape))
            for n, shape in enumerate(call.result_shapes)
        )
        return OpAxes(
            operands=(None,) * len(call.operands),
            results=results,
            share=shares(needs_all=[x for dims in results for dim in dims for x in dim]),
            reason=reason,
        )

    return rule


RULES: dict[OpOverload, AxisRule] = {
    aten._pdist_forward.default: gathered("it measures each pair of rows once"),
    aten.as_strided_scatter.default: gathered("it counts along memory"),
    aten.dist.default: gathered("it is one norm of all differences"),
    aten.multinomial.default: gathered("its random draws are those of the whole tensor"),
    aten.multi_margin_loss.default: gathered("its loss is over all rows"),
    aten.multilabel_margin_loss_forward.default: gathered("its loss is over all rows"),
    aten._ctc_loss.default: gathered("its paths go through all time steps"),
    aten._ctc_loss.Tensor: gathered("its paths go through all time steps"),
}
