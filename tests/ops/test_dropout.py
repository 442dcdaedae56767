"""What dropout drops: as many as asked, each by itself, and the same in any part of a matrix."""

from __future__ import annotations

import math

import pytest
import torch

from ringfx.ops.kernels.dropout import drop_, kept, key_numbers, row_numbers

Tensor = torch.Tensor
SEED = 8_589_934_591
SIZE = 512


def dropped(seed: int, p: float, *, heads: int = 2, first: int = 0, size: int = SIZE) -> Tensor:
    """bool [1, heads, size, size], of positions from ``first``."""
    b, h = torch.arange(1), torch.arange(heads)
    positions = torch.arange(first, first + size)
    m, r = row_numbers(torch.tensor(seed), b, h, positions)
    c = key_numbers(torch.tensor(seed), b, h, positions)
    return kept(m, r, c, p) == 0


def errors(found: Tensor) -> float:
    """Standard errors that the mean of independent numbers of mean 0 and variance 1 is from 0."""
    return abs(float(found.mean())) * math.sqrt(found.numel())


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_each_weight_is_dropped_by_itself(p: float) -> None:
    x = (dropped(SEED, p).double() - p) / math.sqrt(p * (1 - p))
    other = (dropped(SEED + 1, p).double() - p) / math.sqrt(p * (1 - p))
    first, second = x[0]
    assert errors(x) < 4, "the share"
    assert errors(first * second) < 4, "heads"
    assert errors(x * other) < 4, "calls"
    assert errors(first * first.mT) < 4, "queries and keys"
    for rows, columns in ((0, 1), (1, 0), (1, 1), (0, 64), (64, 0)):
        assert errors(first[rows:, columns:] * first[: SIZE - rows, : SIZE - columns]) < 4
    four = first[1:, 1:] * first[:-1, 1:] * first[1:, :-1] * first[:-1, :-1]
    assert errors(four) < 4, "corners of a square"
    for sums in (first.sum(0), first.sum(1)):  # chi-squared, SIZE degrees of freedom
        assert abs(float(sums.square().mean() / SIZE) - 1) < 5 * math.sqrt(2 / SIZE)


def test_a_part_of_a_matrix_drops_what_the_whole_does() -> None:
    whole = dropped(SEED, 0.3)
    assert torch.equal(dropped(SEED, 0.3, first=200, size=77), whole[..., 200:277, 200:277])


def test_no_row_or_column_of_another_seed_is_one_of_this() -> None:
    rows = torch.cat([dropped(s, 0.5, size=64)[0].flatten(0, 1) for s in range(8)])
    assert len(torch.unique(rows, dim=0)) == len(rows)
    assert len(torch.unique(torch.cat([rows, ~rows]), dim=0)) == 2 * len(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_dropped_is_zero_whatever_it_was(dtype: torch.dtype) -> None:
    x = torch.tensor([[1.5, math.nan, -math.inf, -2.0]], dtype=dtype)
    found = drop_(x, torch.tensor([[-1, 0, 0, 0]], dtype=torch.int32))
    assert torch.equal(found, torch.tensor([[1.5, 0, 0, 0]], dtype=dtype))
