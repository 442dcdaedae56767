"""A score map on one tile: a tile function of the tile's own scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from ringfx.ir.tiles import Expr, TileIndex, evaluate
from ringfx.ops.tiling import bias_gradients

__all__ = ["TileMap"]

Tensor = torch.Tensor


@dataclass(eq=False)
class TileMap:
    """The kernel's ``ScoreMap``; remembers a backward for the gradients of captured tensors."""

    expr: Expr
    index: TileIndex
    inputs: Sequence[Tensor]
    _pulled: tuple[Tensor, Tensor] | None = field(default=None, init=False)

    def values(self, s_BHQK: Tensor) -> Tensor:
        found = evaluate(self.expr, self._at(s_BHQK), self.inputs).to(s_BHQK.dtype)
        return found.clone() if found is s_BHQK else found  # the kernel writes into it

    def pulled(self, ds_BHQK: Tensor, s_BHQK: Tensor) -> Tensor:
        self._pulled = ds_BHQK, s_BHQK
        total = torch.zeros_like(s_BHQK)
        nothing: list[Tensor | None] = [None] * len(self.inputs)
        bias_gradients.add(
            self.expr, ds_BHQK, self._at(s_BHQK), self.inputs, nothing, of_scores=total
        )
        return total

    def add_captured(self, sums: Sequence[Tensor | None]) -> None:
        """Adds the gradients of the captured tensors that the last ``pulled`` was a part of.

        Apart from it, so that a tile that does not fit in memory and is computed again is counted
        once.
        """
        assert self._pulled is not None, "a backward went before"
        ds_BHQK, s_BHQK = self._pulled
        bias_gradients.add(self.expr, ds_BHQK, self._at(s_BHQK), self.inputs, sums)

    def _at(self, s_BHQK: Tensor) -> TileIndex:
        return replace(self.index, score=s_BHQK)
