"""What the table says about one model of another package."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import nn

from ringfx.comparison.results import tensors

__all__ = ["Call", "Called", "Row", "found", "ids", "image", "noise"]

Tensor = torch.Tensor
Call: TypeAlias = Callable[..., Any]


def plainly(model: nn.Module, *args: Tensor) -> Any:
    return model(*args)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model, as small as its constructor lets it be, and its inputs."""

    package: str
    name: str
    make: str | Callable[[], nn.Module]
    """``module:Class``, called with ``config``; or a function."""
    config: Mapping[str, Any] = field(default_factory=dict)
    inputs: Callable[[], Sequence[Tensor]]
    call: Call = plainly
    """The model on its inputs."""

    @property
    def label(self) -> str:
        return f"{self.package}/{self.name}"

    def build(self) -> nn.Module:
        made = self.make() if callable(self.make) else found(self.make)(**self.config)
        return Called(made.eval(), self.call)


class Called(nn.Module):
    """Of positional tensors, with every floating tensor of the result."""

    def __init__(self, model: nn.Module, call: Call) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, *args: Tensor) -> list[Tensor]:
        results = self.call(self.model, *args)
        kept = results.to_tuple() if hasattr(results, "to_tuple") else results
        return [x for x in tensors(kept).values() if x.is_floating_point()]


def found(path: str) -> Any:
    """``module:name``."""
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)


def image(side: int, *, channels: int = 3, frames: int = 0) -> Callable[[], list[Tensor]]:
    """Two images, or videos."""
    depth = (frames,) if frames else ()
    return lambda: [noise(2, channels, *depth, side, side)]


def ids(length: int, *, below: int = 50) -> Callable[[], list[Tensor]]:
    """Two rows of token numbers."""
    return lambda: [torch.randint(0, below, (2, length))]


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape)
