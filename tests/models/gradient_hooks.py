"""Hooks on the gradients of hidden states, between two attentions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.models.constructs import Around
from tests.models.shapes import HIDDEN

__all__ = ["HOOKS", "Hooked", "models"]

Tensor = torch.Tensor


def hook(x: Tensor, function: Callable[[Tensor], Tensor | None]) -> Tensor:
    """Registered where there is a gradient."""
    if x.requires_grad:
        x.register_hook(function)  # type: ignore[no-untyped-call]
    return x


def twice(m: Hooked, x: Tensor) -> Tensor:
    """They do not commute, and one use is earlier than both."""
    x = x * 1.5
    y = x.sin()
    hook(x, lambda g: g * 2 + g.square())
    hook(x, lambda g: g.clamp(-0.1, 0.1))
    return x + y


def recomputed(m: Hooked, x: Tensor) -> Tensor:
    found: Tensor = checkpoint(
        lambda a: m.second(hook(a * 2, lambda g: g.clamp(-0.1, 0.1))), x, use_reentrant=False
    )
    return found


def hooked_too_late(m: Hooked, x: Tensor) -> Tensor:
    x = x * 2
    y = x.sin()
    hook(x, lambda g: g * y.detach())
    return x + y


HOOKS: Mapping[str, Callable[..., Any]] = {
    "a gradient hook": lambda m, x: hook(x * 2, lambda g: g.clamp(-0.1, 0.1)),
    "a gradient hook that reads a parameter": lambda m, x: hook(
        x * 2, lambda g: g * m.weight.detach()
    ),
    "a gradient hook that only looks": lambda m, x: hook(x * 2, lambda g: None),
    "a gradient hook that needs all tokens": lambda m, x: hook(
        x * 2, lambda g: g / (g.norm() + 1)
    ),
    "a gradient hook that adds to zeros": lambda m, x: hook(x * 2, lambda g: g + 0.1),
    "two gradient hooks on one value": twice,
    "a gradient hook in a checkpoint": recomputed,
}  # fmt: skip


class Hooked(Around):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.weight = nn.Parameter(torch.rand(HIDDEN) + 0.5)

    def between(self, x: Tensor) -> Tensor:
        found: Tensor = {**HOOKS, "too late": hooked_too_late}[self.name](self, x)
        return found


def models() -> Mapping[str, Callable[[], nn.Module]]:
    return {name: functools.partial(Hooked, name) for name in HOOKS}
