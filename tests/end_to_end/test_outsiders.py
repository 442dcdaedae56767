"""Models as people write them, each of which was once wrong or refused without a reason."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.end_to_end.models import tokens
from tests.support.harness import Case, RankPool, compare_all, compare_here

HIDDEN, HEADS, SEQ_LEN, VOCAB = 16, 2, 29, 96


class Attention(nn.Module):
    """``core(q, k, v)`` on [B, H, S, D], between an embedding and a head."""

    def __init__(self, core: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.core = CORES[core]
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.out = nn.Linear(HIDDEN, HIDDEN)
        self.register_buffer("triangle", torch.tril(torch.ones(1, 1, 64, 64)))
        nn.init.normal_(self.qkv.weight, std=0.4)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        batch, seq_len, hidden = x.shape
        shape = (batch, seq_len, HEADS, hidden // HEADS)
        q, k, v = (t.view(shape).transpose(1, 2) for t in self.qkv(x).split(hidden, dim=2))
        mixed = self.core(self, q, k, v).transpose(1, 2).contiguous().view(batch, seq_len, hidden)
        result: torch.Tensor = self.out(mixed)
        return result


Core = Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def fused(m: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def triangle_buffer(
    m: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    hidden = m.triangle[:, :, : q.shape[2], : q.shape[2]] == 0  # type: ignore[index]
    return scores.masked_fill(hidden, -math.inf).softmax(-1) @ v


def one_key_head_and_the_types_lowest_number(
    m: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    scores = torch.einsum("bhqd,bkd->bhqk", q, k[:, 0]) * q.shape[-1] ** -0.5
    hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    return torch.einsum("bhqk,bkd->bhqd", scores.softmax(-1), v[:, 0])


def one_map_less_another(
    m: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """As differential transformers stack their maps: pairs of heads, one head of values each."""
    batch, _, seq_len, size = q.shape
    q, k = (t.unflatten(-1, (2, -1)).transpose(2, 3).flatten(1, 2) for t in (q, k))
    hidden = torch.ones(seq_len, seq_len, dtype=torch.bool).triu(1)
    weights = ((q @ k.mT) * size**-0.5).masked_fill(hidden, -math.inf).softmax(-1)
    weights = weights.view(batch, HEADS, 2, seq_len, seq_len)
    strength = m.out.bias[:1].sigmoid()
    less: torch.Tensor = weights[:, :, 0] - strength * weights[:, :, 1]
    return less @ v


CORES: Mapping[str, Core] = {
    "contiguous().view() after SDPA": fused,
    "a triangle in a buffer": triangle_buffer,
    "one key head, masked with float64's lowest number": one_key_head_and_the_types_lowest_number,
    "one map less another": one_map_less_another,
}


class Normalised(Attention):
    """What sees neighbours gives zeros in padding, and is then divided by its own norm."""

    def __init__(self, way: str) -> None:
        super().__init__("contiguous().view() after SDPA")
        self.neighbours = NEIGHBOURS[way]
        self.ahead = nn.Conv1d(HIDDEN, HIDDEN, 3, bias=False)
        self.around = nn.Conv1d(HIDDEN, HIDDEN, 3, padding=1, bias=False)
        self.halve = nn.Conv1d(HIDDEN, HIDDEN, 3, stride=2, padding=1, bias=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.neighbours(self, super().forward(input_ids))
        norm: torch.Tensor = y.norm(dim=-1, keepdim=True)
        return y / norm


def channels_first(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Any:
    return function(x.transpose(1, 2)).transpose(1, 2)


NEIGHBOURS: Mapping[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "a convolution": lambda m, x: channels_first(m.around, x),
    "a causal one": lambda m, x: channels_first(m.ahead, F.pad(x, (0, 0, 2, 0))),
    "one that looks ahead": lambda m, x: channels_first(m.ahead, F.pad(x, (0, 0, 0, 2))),
    "one of stride 2": lambda m, x: channels_first(m.halve, x[:, :-1]),
    "a difference of neighbours": lambda m, x: x[:, 1:] - x[:, :-1],
}


def only_tokens() -> dict[str, torch.Tensor]:
    return {"input_ids": tokens(SEQ_LEN, 2)}


def mean_square(output: torch.Tensor) -> torch.Tensor:
    return output.square().mean()


def cases() -> list[Case]:
    return [
        Case(
            model=functools.partial(Attention, name),
            inputs=only_tokens,
            loss=mean_square,
            dtype=torch.float64,
            options={"compiler": "eager"},
            label=name,
        )
        for name in CORES
    ]


def divided() -> list[Case]:
    return [
        Case(
            model=functools.partial(Normalised, way),
            inputs=functools.partial(tokens_of, seq_len),
            loss=weighted,
            dtype=torch.float64,
            options={"compiler": "eager"},
            label=f"{way}, {seq_len} tokens",
        )
        for way in NEIGHBOURS
        for seq_len in (5, 13)
    ]


def tokens_of(seq_len: int) -> dict[str, torch.Tensor]:
    return {"input_ids": tokens(seq_len, 2)}


def weighted(output: torch.Tensor) -> torch.Tensor:
    """The norm itself is 1: weights that differ between tokens and channels."""
    numbers = torch.arange(output.numel(), dtype=output.dtype).view_as(output)
    return (output * numbers.sin()).sum()


class SoftTargets(Attention):
    """Class probabilities, smoothed: every row of a sum counts, but not one of padding."""

    def __init__(self) -> None:
        super().__init__("contiguous().view() after SDPA")

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits = super().forward(input_ids).transpose(1, 2)
        wanted = self.embed.weight.detach()[input_ids].transpose(1, 2).softmax(1)
        total = F.cross_entropy(logits, wanted, label_smoothing=0.1, reduction="sum")
        return F.cross_entropy(logits, wanted, label_smoothing=0.1) + 0.01 * total


class Pooled(Attention):
    """A moving mean over tokens: gathered, announced."""

    def __init__(self) -> None:
        super().__init__("contiguous().view() after SDPA")

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return F.avg_pool1d(super().forward(input_ids).transpose(1, 2), 3, 1, 1)


@pytest.mark.ranks
def test_smoothed_probabilities_and_pools(ranks2: RankPool) -> None:
    options = {"compiler": "eager"}
    cases = [
        Case(model=model, inputs=only_tokens, loss=mean_square, dtype=torch.float64,
             options=options, label=model.__name__)
        for model in (SoftTargets, Pooled)
    ]  # fmt: skip
    for found in compare_all(ranks2, cases):
        found.check()


@pytest.mark.ranks
def test_padding_is_never_divided_by_nothing(ranks3: RankPool) -> None:
    for found in compare_all(ranks3, divided()):
        found.check()
        assert len(found.strategies) == 1, found.label


def test_attention_as_people_write_it_is_right_on_one_rank() -> None:
    for case in cases():
        found = compare_here(case).check()
        assert len(found.strategies) == 1, found.label


@pytest.mark.ranks
def test_attention_as_people_write_it_is_right_on_three_ranks(ranks3: RankPool) -> None:
    for found in compare_all(ranks3, cases()):
        found.check()
        assert len(found.strategies) == 1, found.label
