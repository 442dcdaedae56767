"""The values of a tile function on one tile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ringfx.ir.tiles.expr import INDICES, Expr
from ringfx.ir.tiles.operators import TILE_OPS, as_tensor

__all__ = ["TileIndex", "evaluate"]


@dataclass(frozen=True, eq=False)
class TileIndex:
    """Global indices of one tile: int64 vectors of batch, head, query and key."""

    b: torch.Tensor
    h: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    row: torch.Tensor | None = None
    """Places of the queries among this rank's own; None where they are not known."""
    score: torch.Tensor | None = None
    """[B, H, Q, K]: what a score map is a function of."""

    def broadcast(self, name: str) -> torch.Tensor:
        """The named vector shaped to broadcast over [B, H, Q, K]."""
        shape = [1, 1, 1, 1]
        shape["bhqk".index("q" if name == "row" else name)] = -1
        vector: torch.Tensor | None = getattr(self, name)
        assert vector is not None, "a rank's own rows are read where they are known"
        return vector.view(shape)


def evaluate(expr: Expr, index: TileIndex, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """The expression's values on one tile, broadcastable to [B, H, Q, K]."""
    return as_tensor(_evaluate(expr, index, inputs)).to(index.q.device)


def _evaluate(expr: Expr, index: TileIndex, inputs: Sequence[torch.Tensor]) -> Any:
    """A constant stays a Python number: as in a model's code, it decides no type."""
    head, *args = expr
    if head in INDICES:
        return index.broadcast(head)
    if head == "score":
        assert index.score is not None, "only a score map reads scores"
        return index.score
    if head == "const":
        return args[0]
    if head == "at":
        places = [_evaluate(e, index, inputs) for e in args[1:]]
        return inputs[args[0]][tuple(places)]
    return TILE_OPS[head].evaluate(*(_evaluate(e, index, inputs) for e in args))
