"""Causal and padding masks as models have spelled them for years, with rows that both hide wholly.

A left-padded query keeps no key: its scores are all as low as its masks, and where two meet, the
keys that only one of them hides share its weight, whether scores were replaced or added to. All of
its gradients are compared too, though nobody would train on such a row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import nn

from tests.support.harness import Case, RankPool, compare_all
from tests.support.sampling import one_in

pytestmark = pytest.mark.ranks

Tensor = torch.Tensor
HIDDEN, HEADS, VOCAB = 16, 2, 13
MIN = torch.finfo(torch.float32).min


def added(kept: Tensor, low: float) -> Tensor:
    return torch.zeros_like(kept, dtype=torch.float32).masked_fill(~kept, low)


MASKS: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "gpt": lambda s, causal, given: (
        s * causal.float() - 1e4 * (1 - causal.float()) + (1.0 - given.float()) * -1e4
    ),
    "gpt2": lambda s, causal, given: (
        torch.where(causal, s, torch.full([], MIN)) + (1.0 - given.float()) * MIN
    ),
    "gpt_neo": lambda s, causal, given: (
        torch.where(causal, s, torch.full([], MIN)) + (1.0 - given.float()) * -1e4
    ),
    "opt": lambda s, causal, given: torch.maximum(
        s + (added(given, MIN) + added(causal, MIN)), torch.full([], MIN)
    ),
    "clamped": lambda s, causal, given: (
        s + added(given, MIN) + added(causal, -torch.inf)
    ).clamp(min=MIN),
    "llama": lambda s, causal, given: s + (added(given, MIN) + added(causal, MIN)),
    "t5": lambda s, causal, given: s + (added(causal, -1e9) + (1.0 - given.float()) * -1e9),
    "bloom": lambda s, causal, given: s.masked_fill(~(causal & given), MIN),
}  # fmt: skip


class Padded(nn.Module):
    def __init__(self, mask: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mask = mask
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.qkv = nn.ModuleList(nn.Linear(HIDDEN, 3 * HIDDEN) for _ in range(2))
        self.out = nn.Linear(HIDDEN, HIDDEN)

    def attend(self, qkv: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in qkv(x).chunk(3, -1))
        seq_len = x.shape[1]
        causal = torch.ones(seq_len, seq_len, dtype=torch.bool).tril()[None, None]
        scores = q @ k.transpose(-1, -2) * (HIDDEN // HEADS) ** -0.5
        scores = MASKS[self.mask](scores, causal, mask[:, None, None].bool())
        mixed: Tensor = self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return mixed

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x: Tensor = self.embed(ids)
        for qkv in self.qkv:
            x = x + self.attend(qkv, x, mask)
        return x


def inputs() -> tuple[Tensor, Tensor]:
    mask = torch.ones(3, 13, dtype=torch.long)
    mask[0, :3] = mask[1, :11] = mask[2, -2:] = 0  # over a shard's boundary in the second row
    ids = torch.randint(0, VOCAB, (3, 13), generator=torch.Generator().manual_seed(1))
    return ids, mask


def loss(output: Tensor) -> Tensor:
    weights = torch.arange(output.numel()).view(output.shape).cos()
    return (output + weights).square().sum()


def case(mask: str, strategy: str) -> Case:
    return Case(
        model=functools.partial(Padded, mask), inputs=inputs, loss=loss,
        options={"compiler": "eager", "strategy": strategy}, label=f"{mask}, {strategy}",
    )  # fmt: skip


def check(pool: RankPool, *strategies: str) -> None:
    for found in compare_all(pool, one_in(5, [case(m, s) for m in MASKS for s in strategies])):
        found.check()
        assert len(found.strategies) == 2


@pytest.mark.slow  # on three ranks below
def test_rows_that_two_masks_hide_are_the_unsplit_models_on_two_ranks(ranks2: RankPool) -> None:
    check(ranks2, "production", "ulysses")


def test_rows_that_two_masks_hide_are_the_unsplit_models_on_three_ranks(ranks3: RankPool) -> None:
    check(ranks3, "simple", "collective")
