"""The weights that dropout drops in the tiles of some queries and keys.

Shapes: B batch, H query heads, Q local queries, K local keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ringfx.ops.kernels.dropout import kept, key_numbers, row_numbers
from ringfx.ops.tiling.attention_call import Problem
from ringfx.ops.tiling.pieces import Piece, Run

__all__ = ["Drops"]

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Drops:
    """The numbers of local queries and keys, by their place; those of padding are never read."""

    m_BHQ: Tensor
    r_BHQ: Tensor
    c_BHK: Tensor
    p: float

    @staticmethod
    def of(
        problem: Problem, q_BHQD: Tensor, q_runs: Sequence[Run], k_runs: Sequence[Run]
    ) -> Drops | None:
        """None where nothing is dropped."""
        spec, seed = problem.spec, problem.seed
        if seed is None:
            return None
        b = seed[1:] if len(seed) > 1 else torch.arange(q_BHQD.shape[0], device=q_BHQD.device)
        h = torch.arange(q_BHQD.shape[1], device=q_BHQD.device) + problem.first_head
        first_q, first_k = spec.counts_from
        m, r = row_numbers(seed[0], b, h, _positions(q_runs, q_BHQD.device) - first_q)
        c = key_numbers(seed[0], b, h, _positions(k_runs, q_BHQD.device) - first_k)
        return Drops(m_BHQ=m, r_BHQ=r, c_BHK=c, p=spec.dropout)

    def kept(self, piece: Piece) -> Tensor:
        """int32 [B, H, Q, K]: 0 for the weights of the piece that are dropped, else -1."""
        q, k = (slice(run.offset, run.offset + run.length) for run in (piece.q, piece.k))
        return kept(self.m_BHQ[:, :, q], self.r_BHQ[:, :, q], self.c_BHK[:, :, k], self.p)


def _positions(runs: Sequence[Run], device: torch.device) -> Tensor:
    """Global positions by place, up to the last place of a run."""
    length = max((run.offset + run.length for run in runs), default=0)
    found = torch.zeros(length, dtype=torch.int64, device=device)
    for run in runs:
        here = slice(run.offset, run.offset + run.length)
        torch.arange(run.position, run.stop, out=found[here])
    return found
