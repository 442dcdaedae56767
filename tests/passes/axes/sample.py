"""One call of an operator, and what its tensors are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["Sample", "positive", "real", "truth", "whole"]


@dataclass(frozen=True, eq=False)
class Sample:
    """One call; tensors may stand anywhere among the arguments."""

    op: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    splits: bool = True
    """Whether the row lets any label of this call go split."""

    def __str__(self) -> str:
        shown = [tuple(a.shape) if isinstance(a, torch.Tensor) else a for a in self.args]
        return f"{self.op}{tuple(shown)}{dict(self.kwargs) or ''}"


def real(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def positive(*shape: int) -> torch.Tensor:
    return torch.rand(shape, dtype=torch.float64) + 0.5


def truth(*shape: int) -> torch.Tensor:
    return torch.rand(shape) < 0.5


def whole(top: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, top, shape)
