"""Attention of channels: ranks add up scores of channels, and gather nothing that has tokens."""

from __future__ import annotations

import functools

import pytest
import torch

from ringfx.ir.values import CommKind
from ringfx.passes.axes.features import learned_values
from tests.models.channels import (
    DECOYS,
    HIDDEN,
    OVER_IMAGES,
    OVER_TOKENS,
    Channels,
    Decoy,
    Images,
)
from tests.support.harness import RankPool, compare_all
from tests.support.named_cases import Made, named_cases
from tests.support.split_here import SplitHere, split_here

Tensor = torch.Tensor
WAYS = [(26, 2), (27, 2), (27, 3), (28, 3)]
"""Tokens and ranks: they divide, or do not."""
SCORES = 2 * HIDDEN * HIDDEN * torch.float64.itemsize
"""Bytes of scores of all channels with all others, for a batch of two."""


def tokens(length: int) -> tuple[Tensor]:
    return (torch.randn(2, length, HIDDEN, generator=torch.Generator().manual_seed(length)),)


def sent(found: SplitHere) -> list[CommKind]:
    """What is sent but sums of channels, and gradients of parameters and of the whole input."""
    graph = found.program.captured.graph_module.graph
    inputs = graph.find_nodes(op="placeholder")
    held = [n for n, p in zip(inputs, found.program.captured.is_parameter, strict=True) if p]
    given = {n.name for n in (*learned_values(graph, held), *inputs)}
    return [
        m.kind
        for m in found.program.plan.collectives
        if m.node not in given and (m.kind is not CommKind.ALL_REDUCE or m.bytes_moved > 2 * SCORES)
    ]


@pytest.mark.parametrize("name", OVER_TOKENS)
def test_scores_of_channels_are_added_up_and_nothing_is_gathered(name: str) -> None:
    for length, ranks in WAYS:
        found = split_here(Channels(name), tokens(length), ranks)
        assert found.worst < 1e-9, (length, ranks)
        assert sent(found) == [], (length, ranks)
        assert found.whole == []


@pytest.mark.parametrize("name", OVER_IMAGES)
def test_channels_over_the_places_of_an_image(name: str) -> None:
    for high, ranks in ((12, 2), (13, 2), (12, 3), (14, 3)):
        image = torch.randn(2, 3, high, 5, generator=torch.Generator().manual_seed(high))
        found = split_here(Images(name), [image], ranks)
        assert found.worst < 1e-9, (high, ranks)
        assert set(sent(found)) <= {CommKind.HALO_EXCHANGE}, (high, ranks)
        assert found.whole == []


@pytest.mark.parametrize("name", DECOYS)
def test_attention_over_tokens_is_none_of_channels(name: str) -> None:
    """Few tokens, as many as channels, and more."""
    for length, ranks in ((4, 2), (HIDDEN, 3), (25, 2)):
        found = split_here(Decoy(name, length), tokens(length), ranks)
        assert found.worst < 1e-9, (length, ranks)
        assert len(found.strategies) == 1
        assert found.program.plan.by_channels == found.program.plan.declined == ()


def test_the_plan_says_what_each_rank_has_of_the_scores() -> None:
    plan = split_here(Channels("called", depth=2), tokens(26), 2, strict=True).program.plan
    entries = plan.by_channels
    assert len(entries) == 2
    assert "each rank has all of its weights [2, 2, 6, 6], 1.12 KiB" in entries[0].reason
    assert "2 of channels" in plan.found_words
    assert "attention of channels" in str(plan)


def made(name: str, i: int) -> Made:
    return functools.partial(Channels, name, 2), functools.partial(tokens, 26 + i % 2)


@pytest.mark.slow  # on three ranks below
def test_channel_attention_is_equal_on_two_ranks(ranks2: RankPool) -> None:
    for comparison in compare_all(ranks2, named_cases([*OVER_TOKENS], 4, made)):
        comparison.check()


def test_channel_attention_is_equal_on_three_ranks(ranks3: RankPool) -> None:
    for comparison in compare_all(ranks3, named_cases([*OVER_TOKENS][1:], 9, made)):
        comparison.check()
