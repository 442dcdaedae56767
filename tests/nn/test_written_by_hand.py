"""Dilated attention as people write it in plain PyTorch: exact, and split or announced."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.support.harness import Case, compare_all
from tests.support.ranks import RankPool

HEADS, WIDTH, TOKENS = 4, 32, 64
BRANCHES = ((16, 1), (32, 2))
Tensor = torch.Tensor


def by_sdpa(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    """[..., n, h, d] each; branches count alike."""
    q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(-3, -2), None


def by_softmax(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    """With the logsumexp of its scores, by which branches are weighted."""
    scores = torch.einsum("...qhd,...khd->...hqk", q, k) * q.shape[-1] ** -0.5
    out = torch.einsum("...hqk,...khd->...qhd", scores.softmax(-1), v)
    return out, scores.logsumexp(-1).transpose(-2, -1)


class ByHand(nn.Module):
    """Segments by reshape, kept rows by a strided slice, results written back at their places."""

    def __init__(self, attend: Any) -> None:
        super().__init__()
        self.attend = attend
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (HEADS, -1)) for y in self.qkv(x).chunk(3, -1))
        found = [self.branch(q, k, v, w, r) for w, r in BRANCHES]
        outs, weights = (torch.stack(each) for each in zip(*found, strict=True))
        mixed = (outs * weights.softmax(0)[..., None]).sum(0)
        return x + self.out(mixed.flatten(-2))  # type: ignore[no-any-return]

    def branch(
        self, q: Tensor, k: Tensor, v: Tensor, segment: int, rate: int
    ) -> tuple[Tensor, Tensor]:
        out, weight = torch.zeros_like(q), q.new_full(q.shape[:-1], -1e9)
        out, weight = (y.unflatten(1, (-1, segment)) for y in (out, weight))
        for first in range(rate):
            kept = (slice(None), slice(None), slice(first, None, rate), slice(first, None, rate))
            part, lse = self.attend(*(y.unflatten(1, (-1, segment))[kept] for y in (q, k, v)))
            out[kept] = part
            weight[kept] = 0.0 if lse is None else lse
        return out.flatten(1, 2), weight.flatten(1, 2)


class Encoder(nn.Module):
    def __init__(self, attend: Any) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 3)
        self.layers = nn.ModuleList([ByHand(attend) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(F.gelu(x)).mean(1)  # type: ignore[no-any-return]


def inputs(batch: int) -> tuple[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return (torch.randn(batch, TOKENS, 8, generator=generator),)


def mean_square(output: Tensor) -> Tensor:
    return output.square().mean()


def case(attend: Any, batch: int) -> Case:
    return Case(
        model=functools.partial(Encoder, attend), inputs=functools.partial(inputs, batch),
        loss=mean_square, dtype=torch.float64, label=f"{attend.__name__}, {batch}",
        options={"compiler": "eager", "on_unsupported": "gather"},
    )  # fmt: skip


@pytest.mark.ranks
def test_it_is_exact_and_split(ranks2: RankPool) -> None:
    """Kept rows lie at distances that no layout knows: each rank attends in a part of the batch."""
    for found in compare_all(ranks2, [case(by_sdpa, 1), case(by_sdpa, 2)]):
        assert "replicated" not in found.check().strategies


@pytest.mark.ranks
def test_branches_weighted_by_their_scores_are_exact(ranks2: RankPool) -> None:
    for found in compare_all(ranks2, [case(by_softmax, 1)]):
        found.check()
