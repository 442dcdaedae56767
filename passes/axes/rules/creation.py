"""Operators that make values from sizes alone."""

from __future__ import annotations

import torch

from ringfx.passes.axes import how
from ringfx.passes.axes.call import AxisRule, Call, OpAxes
from ringfx.passes.axes.rules.pattern import shares
from ringfx.passes.axes.rules.views import numbered
from ringfx.torch_compat.operators import OpOverload

__all__ = ["RULES"]

aten = torch.ops.aten


def constant(call: Call) -> OpAxes:
    """Equal everywhere: each rank makes its own part."""
    return OpAxes(
        operands=(None,) * len(call.operands),
        results=(numbered(call.result_shape),),
        how=how.SizeArgument(name="size") if "size" in call.arguments else None,
    )


def counted(call: Call) -> OpAxes:
    """Depends on the global index (arange) or the generator (random): made replicated, then cut."""
    labels = numbered(call.result_shape)
    return OpAxes(
        operands=(None,) * len(call.operands),
        results=(labels,),
        share=shares(needs_all=[x for dim in labels for x in dim]),
        reason="it counts or draws over the whole axis",
    )


RULES: dict[OpOverload, AxisRule] = {
    **dict.fromkeys(
        (
            aten.full.default, aten.zeros.default, aten.ones.default, aten.new_full.default,
            aten.new_zeros.default, aten.new_ones.default, aten.scalar_tensor.default,
            aten.empty.memory_format, aten.new_empty.default,
        ),
        constant,
    ),
    **dict.fromkeys(
        (
            aten.arange.default, aten.arange.start, aten.arange.start_step, aten.linspace.default,
            aten.eye.default, aten.eye.m, aten.rand.default, aten.randn.default,
            aten.randint.default, aten.randint.low, aten.randperm.default, aten.bernoulli.default,
        ),
        counted,
    ),
}  # fmt: skip
