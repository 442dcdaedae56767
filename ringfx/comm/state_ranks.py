"""The ranks that parameters, gradients and optimizer state are sharded over."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

__all__ = ["ONE_RANK", "StateRanks"]


@dataclass(frozen=True, kw_only=True)
class StateRanks:
    """Those of the sequence, or those and data parallel ones; and the types of what is sent.

    Every rank has its rows of a parameter. The gradient of a row is the **sum** over the ranks of a
    sequence (each has its tokens' part) and the **mean** over data parallel replicas (each has a
    batch of its own), as with FSDP2 beside any other split of the sequence.
    """

    ranks: int
    rank: int = 0
    group: str = ""
    """Name of their process group."""
    replicas: int = 1
    """Data parallel replicas: ``ranks`` is the ranks of a sequence times these."""
    dtype: torch.dtype | None = None
    """Of rows and their gradients; None: as the model computes in."""
    param_dtype: torch.dtype | None = None
    """Parameters are sent and used in it; None: as they are."""
    reduce_dtype: torch.dtype | None = None
    """Gradients are sent and summed in it; None: as they are computed."""

    def bytes_kept(self, parameter: torch.Tensor) -> int:
        """Bytes of all rows together, of a parameter as the program has it."""
        return parameter.numel() * (self.dtype or parameter.dtype).itemsize

    def bytes_reduced(self, parameter: torch.Tensor) -> int:
        """Bytes of a gradient as it is sent."""
        return parameter.numel() * (self.reduce_dtype or parameter.dtype).itemsize

    @property
    def others(self) -> int:
        """Ranks of a message, where they are not the sequence's; 0 where they are."""
        return self.ranks if self.replicas > 1 else 0

    def as_argument(self) -> tuple[Any, ...]:
        """Plain values, for a program."""
        return tuple(getattr(self, f.name) for f in fields(self))

    @staticmethod
    def of_argument(values: tuple[Any, ...]) -> StateRanks:
        """From ``as_argument``."""
        names = [f.name for f in fields(StateRanks)]
        return StateRanks(**dict(zip(names, values, strict=True)))


ONE_RANK = StateRanks(ranks=1)
