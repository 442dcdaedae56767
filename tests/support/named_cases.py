"""Cases for real ranks from a family of models by name: float64, one compiled, the others eager."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.harness import Case
from tests.support.sampling import one_in

__all__ = ["Made", "named_cases", "weighed"]

Made = tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]
"""A model and its inputs, made on each rank."""


def named_cases(names: Sequence[str], share: int, made: Callable[[str, int], Made]) -> list[Case]:
    """One in ``share`` of the names. ``made`` is given a name and its number among those taken."""
    taken = [(name, i, *made(name, i)) for i, name in enumerate(one_in(share, names))]
    return [
        Case(
            model=model, inputs=inputs, loss=weighed, dtype=torch.float64,
            options={"compiler": "eager" if i else "aot_eager"}, label=name,
        )
        for name, i, model, inputs in taken
    ]  # fmt: skip


def weighed(found: Any) -> Tensor:
    """A loss with another weight for every element of every result."""
    parts = [found] if isinstance(found, Tensor) else [*found]
    return torch.stack(
        [(y * torch.arange(y.numel(), dtype=y.dtype).view(y.shape).cos()).sum() for y in parts]
    ).sum()
