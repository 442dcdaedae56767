"""Every length S = p k + r: each remainder r, fewer tokens than ranks, and a single token."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from tests.end_to_end.models import plain, shifted_loss, tokens
from tests.support.harness import Case, RankPool, compare_all
from tests.support.sampling import one_in

pytestmark = pytest.mark.ranks

# Zigzag and contiguous shards, a ring and a gather.
STRATEGIES = ("production", "collective")


def only_tokens(seq_len: int) -> dict[str, torch.Tensor]:
    return {"input_ids": tokens(seq_len, 2)}


def loss_of_next_tokens(seq_len: int, output: Any) -> torch.Tensor:
    """Cross-entropy with shifted labels, and a term that a single token has too."""
    logits: torch.Tensor = output[0] if isinstance(output, tuple) else output
    square = logits.square().mean()
    return square if seq_len == 1 else square + shifted_loss(logits, tokens(seq_len, 2))


def cases(ranks: int) -> list[Case]:
    return [
        Case(
            model=plain(),
            inputs=functools.partial(only_tokens, seq_len),
            loss=functools.partial(loss_of_next_tokens, seq_len),
            dtype=torch.float64,
            options={"strategy": strategy, "compiler": "eager"},
            label=f"S={seq_len}, {strategy}, p={ranks}",
        )
        for seq_len in range(1, 2 * ranks)
        for strategy in STRATEGIES
    ]


def check(pool: RankPool, ranks: int, share: int = 1) -> None:
    for found in compare_all(pool, one_in(share, cases(ranks))):
        found.check()


def test_on_two_ranks(ranks2: RankPool) -> None:
    check(ranks2, 2)


def test_on_three_ranks(ranks3: RankPool) -> None:
    check(ranks3, 3, share=3)


@pytest.mark.slow
def test_on_four_ranks(ranks4: RankPool) -> None:
    check(ranks4, 4)
