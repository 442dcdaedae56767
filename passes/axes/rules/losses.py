"""Losses that sum. Means are rewritten as sum / count before (see passes/capture/losses.py)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from ringfx.passes.axes import how
from ringfx.passes.axes.call import AxisRule, Call, Labels, OpAxes
from ringfx.passes.axes.rules.pattern import shares
from ringfx.passes.axes.rules.pointwise import broadcast
from ringfx.torch_compat.operators import OpOverload

__all__ = ["RULES"]

aten = torch.ops.aten
NONE, MEAN, SUM = 0, 1, 2
NOTHING = {"self": 0.0, "target": 0.0}


def cross_entropy(call: Call) -> OpAxes:
    """input [N, C, d1...] or [C]; target class indices [N, d1...] or probabilities like input.

    nll_loss, which takes what cross entropy's softmax gives, is cut alike.
    """
    shape = call.shape("self")
    class_dim = 1 if len(shape) > 1 else 0
    labels = tuple(
        (("class",) if i == class_dim else (f"n{i}",)) if s != 1 else ()
        for i, s in enumerate(shape)
    )
    rows = tuple(label for i, label in enumerate(labels) if i != class_dim)
    by_index = call.shape("target") != shape
    target: Labels = rows if by_index else labels
    operands: list[Labels] = [labels, target]
    if call["weight"] is not None:
        operands.append((labels[class_dim],))
    summed = [x for dim in rows for x in dim]
    total = call["reduction"] == SUM
    return OpAxes(
        operands=tuple(operands),
        results=(() if call["reduction"] != NONE else rows,),
        share=shares(
            sum=summed if total else [],
            needs_all=["class"] + (summed if call["reduction"] == MEAN else []),
        ),
        how=how.Sum(fill={1: call["ignore_index"] if by_index else 0}) if total else None,
        reason="a row of classes needs all of them",
    )


def elementwise_loss(call: Call, fill: Mapping[str, float] = NOTHING) -> OpAxes:
    """mse, l1 and their kin: pointwise, then summed, over broadcast operands.

    ``fill`` gives a loss of exactly 0, whatever weights say. A sum may be partial along what every
    operand of it carries: elsewhere padding could not be made 0.
    """
    wide = torch.broadcast_shapes(*call.shapes)
    operands = tuple(broadcast(shape, wide) for shape in call.shapes)
    labels = broadcast(wide, wide)
    summed = [x for dim in labels for x in dim]
    reduction = call["reduction"]
    filled = {call.position(name): value for name, value in fill.items()}
    carried = [{x for dim in operands[i] for x in dim} for i in filled]
    partial = [x for x in summed if reduction == SUM and all(x in each for each in carried)]
    return OpAxes(
        operands=operands,
        results=(labels if reduction == NONE else (),),
        share=shares(
            sum=partial, needs_all=[x for x in summed if reduction != NONE and x not in partial]
        ),
        how=how.Sum(fill=filled) if reduction == SUM else None,
    )


RULES: dict[OpOverload, AxisRule] = {
    aten.cross_entropy_loss.default: cross_entropy,
    aten.nll_loss_nd.default: cross_entropy,
    aten.nll_loss.default: cross_entropy,
    aten.nll_loss2d.default: cross_entropy,
    aten.mse_loss.default: elementwise_loss,
    aten.l1_loss.default: elementwise_loss,
    aten.smooth_l1_loss.default: elementwise_loss,
    aten.huber_loss.default: elementwise_loss,
    aten.binary_cross_entropy.default: elementwise_loss,
    # Logits so far out that a half precision number still holds them, on the target's side.
    aten.binary_cross_entropy_with_logits.default: partial(
        elementwise_loss, fill={"self": -1e4, "target": 0.0}
    ),
    aten.soft_margin_loss.default: partial(elementwise_loss, fill={"self": 1e4, "target": 1.0}),
}
