"""Masks that modules keep in buffers, on several ranks: recognised, skipped, balanced, exact."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from tests.end_to_end.models import tokens
from tests.support.harness import Case, RankPool, compare_all
from tests.support.sampling import one_in

pytestmark = pytest.mark.ranks

Tensor = torch.Tensor
N, HIDDEN, HEADS, VOCAB = 64, 24, 3, 40


def causal() -> Tensor:
    return torch.ones(N, N, dtype=torch.bool).tril()


def window() -> Tensor:
    return torch.where(causal() & ~torch.ones(N, N, dtype=torch.bool).tril(-9), 0.0, -math.inf)


def sloped() -> Tensor:
    slopes = 2.0 ** -(torch.arange(HEADS)[:, None, None] + 1.0)
    distance = torch.arange(N)[None, :] - torch.arange(N)[:, None]
    return (slopes * distance).masked_fill(~causal(), -math.inf)


def by_distance() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    place = torch.arange(N)[None, :] - torch.arange(N)[:, None] + N - 1
    return torch.randn(HEADS, 2 * N, generator=generator)[:, place]


def unnamed() -> Tensor:
    return torch.rand(N, N, generator=torch.Generator().manual_seed(2)) > 0.3


MASKS: Mapping[str, tuple[Any, str, str]] = {
    "causal": (causal, "causal", "zigzag"),
    "a float window": (window, "causal, window 9", "contiguous"),
    "ALiBi": (sloped, "causal, ALiBi bias", "zigzag"),
    "by distance": (by_distance, "full, relative bias", "contiguous"),
    "unnamed": (unnamed, "a mask given as input", "contiguous"),
}
EVERY = {"ALiBi": ("simple", "collective", "ulysses"), "unnamed": ("simple", "ulysses")}


class Keeps(nn.Module):
    """Scores spelled out and a corner of a mask that the model keeps, as GPT-2 once had it."""

    def __init__(self, mask: str) -> None:
        super().__init__()
        self.register_buffer("mask", MASKS[mask][0]()[None])
        self.mask: Tensor
        self.embed, self.head = nn.Embedding(VOCAB, HIDDEN), nn.Linear(HIDDEN, VOCAB)
        self.layers = nn.ModuleList([nn.Linear(HIDDEN, 3 * HIDDEN) for _ in range(2)])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        n = ids.shape[1]
        for layer in self.layers:
            q, k, v = layer(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            mask = self.mask[:, ..., :n, :n]
            scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
            if mask.dtype == torch.bool:
                scores = torch.where(mask, scores, torch.finfo(scores.dtype).min)
            else:
                scores = scores + mask.to(scores.dtype)
            x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        logits: Tensor = self.head(x)
        return logits


def made(mask: str) -> nn.Module:
    torch.manual_seed(3)
    return Keeps(mask)


def drawn() -> dict[str, Tensor]:
    return {"ids": tokens(53, 2, VOCAB)}


def mean_square(output: Tensor) -> Tensor:
    return output.square().mean()


def cases() -> list[Case]:
    return [
        Case(
            model=functools.partial(made, mask),
            inputs=drawn,
            loss=mean_square,
            options={"strategy": strategy, "compiler": "eager"},
            label=f"{mask}, {strategy}",
        )
        for mask in MASKS
        for strategy in ("production", *EVERY.get(mask, ()))
    ]


def check(pool: RankPool) -> None:
    some = one_in(3, cases())
    for found, case in zip(compare_all(pool, some), some, strict=True):
        found.check()
        _, words, layout = MASKS[case.label.split(", ")[0]]
        plan = found.ranks[0].plan
        text = " ".join(str(plan).split())
        assert words in text, plan
        assert layout in text, plan


def test_kept_masks_on_three_ranks(ranks3: RankPool) -> None:
    check(ranks3)
