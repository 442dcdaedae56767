"""A split model beside the unsplit one, on every rank that torchrun has started."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

import ringfx

__all__ = ["largest_difference", "on_ranks"]


def largest_difference(model: nn.Module, split: nn.Module, x: Tensor) -> float:
    """Of the output and every gradient, each over its own largest entry."""
    pairs = zip(_run(model, x), _run(split, x), strict=True)
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


def _run(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, the gradient of x, and those of the parameters."""
    x = x.detach().requires_grad_()
    model.zero_grad()
    y = model(x)
    (y * torch.linspace(-1, 2, y.shape[1], dtype=y.dtype)[:, None]).sum().backward()
    gradients = [x.grad, *(p.grad for p in model.parameters())]
    return [y.detach() + 0, *(g.clone() for g in gradients if g is not None)]


def on_ranks(compared: Callable[[], tuple[float, ringfx.Plan]]) -> bool:
    """Run it on this rank; on the first, whose answer is True, say what came out."""
    dist.init_process_group("gloo")
    difference, plan = compared()
    is_first = dist.get_rank() == 0
    if is_first:
        print(plan)
        print(f"largest difference from the unsplit model: {difference:.1e}")
    assert difference < 1e-9, difference
    dist.destroy_process_group()
    return is_first
