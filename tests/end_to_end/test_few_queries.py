"""Few queries over many keys: equal to the unsplit model, and no key or value is gathered."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ringfx.strategies import SPLIT_KV
from tests.models.few_queries import HIDDEN, LATENTS, MANY, POOLS, Pooling
from tests.support.harness import Case, RankPool, compare_all
from tests.support.sampling import one_in
from tests.support.split_here import split_here

PLAIN = (
    "one_query_without_an_axis", "one_score_a_token", "masked_score", "slots", "by_einsum",
    "scores_of_heads",
)  # fmt: skip
"""Whose scores have no axis of queries, are a projection, or are no softmax over the keys."""
FEW_BYTES = 2 * LATENTS * HIDDEN * 8
"""The hidden states of the latents of both batch entries, in float64."""


def inputs(length: int) -> tuple[torch.Tensor]:
    return (torch.randn(2, length, HIDDEN, generator=torch.Generator().manual_seed(length)),)


WAYS = [(13, 3), (24, 2)]


@pytest.mark.parametrize("name", POOLS)
def test_few_queries_are_equal_and_keys_stay(name: str) -> None:
    ways = WAYS[:: 1 if [*POOLS].index(name) % 2 else -1]
    for length, ranks in one_in(len(ways), ways):
        found = split_here(Pooling(name), inputs(length), ranks)
        assert found.worst < 1e-10
        assert (SPLIT_KV.name in found.strategies) == (name not in PLAIN)
        assert found.whole == []
        moves = [m for m in found.program.plan.collectives if m.kind.gathers and not m.in_backward]
        assert all(m.bytes_moved <= FEW_BYTES for m in moves), moves


@pytest.mark.parametrize("name", MANY)
def test_many_queries_stay_as_they_are(name: str) -> None:
    found = split_here(Pooling(name), inputs(24), 2)
    assert found.worst < 1e-10
    assert SPLIT_KV.name not in found.strategies


def test_a_forced_strategy_leaves_few_queries_alone() -> None:
    found = split_here(Pooling("map_head"), inputs(13), 3, strategy="simple")
    assert found.strategies == ["simple", SPLIT_KV.name]
    layer = found.program.plan.layers[1]
    assert layer.reason == (
        '1 query over 13 keys: no key is moved; strategy="simple" was requested but cannot run here'
    )


def weighed(y: torch.Tensor) -> torch.Tensor:
    return (y * torch.arange(y.numel(), dtype=y.dtype).view(y.shape).cos()).sum()


def test_few_queries_are_equal_on_real_ranks(ranks2: RankPool) -> None:
    cases = [
        Case(
            model=functools.partial(Pooling, name),
            inputs=functools.partial(inputs, 13),
            loss=weighed,
            dtype=torch.float64,
            options={"compiler": "aot_eager"},
            label=name,
        )
        for name in one_in(9, POOLS)
    ]
    for comparison in compare_all(ranks2, cases):
        comparison.check()


class Step(nn.Module):
    """One step of a decoder: its keys are those given and its own, and are kept for the next."""

    def __init__(self, *, keeps: bool) -> None:
        super().__init__()
        self.qkv, self.keeps = nn.Linear(HIDDEN, 3 * HIDDEN), keeps

    def forward(self, x: torch.Tensor, past: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        k, v = torch.cat([past, k], 2), torch.cat([past.sin(), v], 2)
        found = F.scaled_dot_product_attention(q, k, v)
        return (found, k, v) if self.keeps else (found,)


@pytest.mark.parametrize("keeps", [True, False])
def test_keys_that_are_kept_for_the_next_step_stay_whole(keeps: bool) -> None:
    past = torch.randn(2, 1, 20, HIDDEN, generator=torch.Generator().manual_seed(0))
    found = split_here(Step(keeps=keeps), (*inputs(1), past), 2)
    assert found.worst < 1e-10
    assert (SPLIT_KV.name in found.strategies) == (not keeps)
