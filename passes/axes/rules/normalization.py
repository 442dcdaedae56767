"""Normalisations: their statistics run over named dimensions and stay local along the others."""

from __future__ import annotations

import torch

from ringfx.passes.axes.call import AxisRule, Call, Labels, OpAxes
from ringfx.passes.axes.rules.pattern import shares
from ringfx.passes.axes.rules.views import numbered
from ringfx.torch_compat.operators import OpOverload

__all__ = ["RULES"]

aten = torch.ops.aten


def trailing(call: Call) -> OpAxes:
    """layer_norm, rms_norm: statistics over the last dimensions."""
    shape = call.shapes[0]
    labels = numbered(shape)
    count = len(call["normalized_shape"])
    normalized: Labels = labels[len(shape) - count :]
    return OpAxes(
        operands=(labels,) + (normalized,) * (len(call.operands) - 1),
        results=(labels,) * len(call.result_shapes),
        share=shares(needs_all=[x for dim in normalized for x in dim]),
        reason="it normalises over the axis",
    )


def grouped(call: Call) -> OpAxes:
    """group_norm: statistics over everything but the batch."""
    labels = numbered(call.shapes[0])
    channel: Labels = (labels[1],)
    return OpAxes(
        operands=(labels,) + (channel,) * (len(call.operands) - 1),
        results=(labels,),
        share=shares(needs_all=[x for dim in labels[1:] for x in dim]),
        reason="it normalises over the axis",
    )


RULES: dict[OpOverload, AxisRule] = {
    aten.layer_norm.default: trailing,
    aten.rms_norm.default: trailing,
    aten.group_norm.default: grouped,
}
