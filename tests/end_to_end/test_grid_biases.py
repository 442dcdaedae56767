"""Biases that queries of a grid compute: each rank makes those of its own queries alone."""

from __future__ import annotations

import functools

import pytest
import torch

from ringfx.ir.note import NoteKind, texts_of
from tests.models.grid_biases import DECOYS, HIDDEN, SPELLINGS, Grid
from tests.support.harness import RankPool, compare_all
from tests.support.named_cases import Made, named_cases
from tests.support.split_here import split_here

Tensor = torch.Tensor
WAYS = [(6, 4, 2), (5, 4, 2), (6, 4, 3), (7, 4, 3)]
"""Rows and columns of the grid, and ranks."""


def image(high: int, wide: int = 4) -> tuple[Tensor]:
    made = torch.Generator().manual_seed(high)
    return (torch.randn(2, high, wide, HIDDEN, generator=made),)


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_bias_of_each_query_is_made_by_the_rank_that_has_it(name: str) -> None:
    for high, wide, ranks in WAYS:
        found = split_here(Grid(name), image(high, wide), ranks)
        assert found.worst < 1e-9, (high, ranks)
        assert found.gathered == [], (high, ranks)
        assert texts_of(found.program.plan.notes, NoteKind.DENSE_MASK) == []
        (layer,) = found.program.plan.layers
        assert not layer.is_replicated


@pytest.mark.parametrize("name", DECOYS)
def test_what_is_no_row_of_its_own_query_is_equal(name: str) -> None:
    for high, wide, ranks in WAYS:
        found = split_here(Grid(name), image(high, wide), ranks)
        assert found.worst < 1e-9, (high, ranks)


def made(name: str, i: int) -> Made:
    return functools.partial(Grid, name), functools.partial(image, 6 + i % 2)


@pytest.mark.slow  # on three ranks below
def test_biases_of_queries_are_equal_on_two_ranks(ranks2: RankPool) -> None:
    for comparison in compare_all(ranks2, named_cases([*SPELLINGS], 4, made)):
        comparison.check()


def test_biases_of_queries_are_equal_on_three_ranks(ranks3: RankPool) -> None:
    for comparison in compare_all(ranks3, named_cases([*SPELLINGS][1:], 7, made)):
        comparison.check()
