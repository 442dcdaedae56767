"""What one split value and its aliases hold."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from weakref import WeakSet

import torch

from ringfx.split_tensor.deferred import Deferred
from ringfx.split_tensor.spec import GatherObserver

__all__ = ["Cell"]


@dataclass(eq=False)
class Cell:
    """What one value and its aliases hold: this rank's part and, once gathered, all of it."""

    held: torch.Tensor | Deferred
    """This rank's part, or how it is computed when it is touched."""
    whole: torch.Tensor | None = None
    """Once gathered it is the value: views of it may be written."""
    made: Counter[str] = field(default_factory=Counter)
    """What was computed from it without gathering, to number the results."""
    on_gather: GatherObserver | None = None
    """Called for a gather, where programs of one model hand the value on."""
    gathered_at: int | None = None
    """Version at which it was gathered: written since, it is no longer this rank's part."""
    viewed: int | None = None
    """Version at which rows of it were handed out, or it was taken of another one, as a view that
    is none; None: never."""
    aliased: bool = False
    """Several results of a program are this one value."""
    views: WeakSet[Cell] = field(default_factory=WeakSet)
    """Views of this rank's part."""

    @property
    def local(self) -> torch.Tensor:
        """This rank's part."""
        if isinstance(self.held, Deferred):
            self.held = self.held.part()
        return self.held

    def rows(self, dim: int, rows: torch.Tensor) -> torch.Tensor:
        """Some tokens of dimension ``dim``, by their numbers on this rank."""
        if isinstance(self.held, Deferred):
            return self.held.rows(rows)
        return self.held.index_select(dim, rows)
