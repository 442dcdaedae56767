"""Overlapping pools along the tokens: ranks exchange what windows reach, and nothing more."""

from __future__ import annotations

import functools

import pytest
import torch

from ringfx.comm import halo, halo_pools
from ringfx.ir.values import CommKind
from tests.models.pools import DECOYS, HIDDEN, OVER_IMAGES, OVER_TOKENS, Pooled
from tests.support.harness import RankPool, compare_all
from tests.support.named_cases import Made, named_cases
from tests.support.split_here import SplitHere, split_here

Tensor = torch.Tensor
WAYS = [(16, 2), (17, 2), (18, 3), (23, 3)]
"""Rows, or tokens, and ranks: they divide, or do not."""


def image(high: int) -> tuple[Tensor]:
    made = torch.Generator().manual_seed(high)
    return (torch.randn(2, HIDDEN, high, 5, generator=made),)


def tokens(length: int) -> tuple[Tensor]:
    made = torch.Generator().manual_seed(length)
    return (torch.randn(2, 2 * length, HIDDEN, generator=made),)


def sent(found: SplitHere) -> set[CommKind]:
    """Of messages that are no gradients of parameters or of the input."""
    inputs = found.program.captured.graph_module.graph.find_nodes(op="placeholder")
    given = {n.name for n in inputs}
    return {m.kind for m in found.program.plan.collectives if m.node not in given}


@pytest.mark.parametrize("name", [*OVER_IMAGES, *OVER_TOKENS])
def test_a_pool_of_overlapping_windows_exchanges_what_they_reach(name: str) -> None:
    for length, ranks in WAYS:
        given = tokens(length) if name in OVER_TOKENS else image(length)
        found = split_here(Pooled(name), given, ranks)
        assert found.worst < 1e-9, (length, ranks)
        assert sent(found) <= {CommKind.HALO_EXCHANGE, CommKind.ALL_TO_ALL}, (length, ranks)
        assert found.whole == []
        calls = [n.target for n in found.program.local.graph_module.graph.nodes]
        assert halo_pools.pool_tokens in calls
        assert calls.count(halo.convolve_tokens) <= 1, "the layer behind it"


@pytest.mark.parametrize("name", DECOYS)
def test_what_is_no_such_pool_is_equal(name: str) -> None:
    for length, ranks in ((16, 2), (20, 3), (23, 3)):
        found = split_here(Pooled(name), image(length), ranks)
        assert found.worst < 1e-9, (length, ranks)


def test_nothing_beyond_the_ends_counts_on_any_rank() -> None:
    """All elements are far below zero."""
    found = split_here(Pooled("as_large"), [image(16)[0] * 0 - 50.0], 2)
    assert found.worst < 1e-9
    assert all(bool(x.isfinite().all()) for each in found.results for x in each)


def made(name: str, i: int) -> Made:
    given = tokens if name in OVER_TOKENS else image
    return functools.partial(Pooled, name), functools.partial(given, 18 + i % 2)


@pytest.mark.slow  # on three ranks below
def test_pools_are_equal_on_two_ranks(ranks2: RankPool) -> None:
    for comparison in compare_all(ranks2, named_cases([*OVER_IMAGES, *OVER_TOKENS], 5, made)):
        comparison.check()


def test_pools_are_equal_on_three_ranks(ranks3: RankPool) -> None:
    for comparison in compare_all(ranks3, named_cases([*OVER_IMAGES, *OVER_TOKENS][1:], 11, made)):
        comparison.check()
