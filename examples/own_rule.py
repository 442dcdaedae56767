"""A rule of one's own: what an operator of torch.library does along the axes of its operands.

    torchrun --nproc-per-node 2 -m examples.own_rule

compares a model with that operator, split over the ranks, with the unsplit model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import ringfx
from examples.on_ranks import largest_difference, on_ranks
from examples.own_strategy import Attention
from ringfx.passes.axes.rules.pattern import axes


@torch.library.custom_op("examples::swish", mutates_args=())
def swish(x: Tensor, slope: Tensor) -> Tensor:
    """x * sigmoid(slope * x), token by token: x [B, S, C], slope [C]."""
    return x * torch.sigmoid(slope * x)


@swish.register_fake
def _(x: Tensor, slope: Tensor) -> Tensor:
    return torch.empty_like(x)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    x, slope = ctx.saved_tensors
    s = torch.sigmoid(slope * x)
    common = dy * x * s * (1 - s)
    return dy * s + common * slope, (common * x).sum((0, 1))


swish.register_autograd(_backward, setup_context=_save)

# One letter an axis. No operand sums over tokens (s) or needs all of them: each rank runs its own.
# slope has no s, so its gradient is summed over the ranks.
RULES = ringfx.RULES | {
    torch.ops.examples.swish.default: axes(x="b s c", slope="c", out="b s c"),
}


class Model(nn.Module):
    """Attention, then the operator."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.slope = Attention(32, 4, 2), nn.Parameter(torch.linspace(-1, 2, 32))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.ops.examples.swish(self.attention(x), self.slope)
        return result


def compared() -> tuple[float, ringfx.Plan]:
    """On every rank: the largest relative difference from the unsplit model, and the plan."""
    torch.manual_seed(0)
    model, x = Model().double(), torch.randn(2, 41, 32, dtype=torch.float64)
    split = ringfx.optimize(model, rules=RULES, compiler="aot_eager")
    difference, plan = largest_difference(model, split, x), split.plan
    assert isinstance(plan, ringfx.Plan)
    return difference, plan


if __name__ == "__main__":
    on_ranks(compared)
