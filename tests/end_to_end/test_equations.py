"""Systems of equations of each chunk of tokens (the delta rule by chunks): solved where it is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.split_here import split_here

HIDDEN, CHUNK = 8, 4


class DeltaRule(nn.Module):
    """x [B, S, hidden]: what each chunk writes and reads, then attention over all of it."""

    def __init__(self, solve: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.solve = solve
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.rate = nn.Linear(HIDDEN, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        k, rate = F.normalize(k, dim=-1), self.rate(x).sigmoid()
        key, value, each = (y.unflatten(1, (-1, CHUNK)) for y in (k, v * rate, rate))
        system = torch.eye(CHUNK, dtype=x.dtype) + (each * key @ key.mT).tril(-1)
        if self.solve == "triangular":
            made = torch.linalg.solve_triangular(system, value, upper=False)
        elif self.solve == "rows":
            made = torch.linalg.solve(system.mT, value.mT, left=False).mT
        elif self.solve == "inverse":
            made = torch.linalg.inv(system) @ value
        else:
            made = torch.cholesky_solve(value, torch.linalg.cholesky(system @ system.mT))
        y = F.scaled_dot_product_attention(q, k, made.flatten(1, 2), is_causal=True)
        result: Tensor = self.out(x + y)
        return result


@pytest.mark.parametrize("solve", ["triangular", "rows", "inverse", "cholesky"])
def test_equations_of_chunks_stay_with_their_chunks(solve: str) -> None:
    for length, ranks in ((24, 2), (20, 2), (28, 3)):
        found = split_here(DeltaRule(solve), (torch.randn(2, length, HIDDEN),), ranks)
        assert found.worst < 1e-9, (length, ranks)
        assert found.gathered == [], (length, ranks)
        assert found.whole == [], (length, ranks)
