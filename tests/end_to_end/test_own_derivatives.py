"""Operators with a derivative of their own after attention: eager's gradients at edge points."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.support.harness import Case, Comparison, compare_all, compare_here
from tests.support.ranks import RankPool

HEADS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cdist, equal rows": lambda y: torch.cdist(y, y),
    "cdist by products, equal rows": lambda y: torch.cdist(y.repeat(1, 3, 1), y),
    "pdist, equal rows": lambda y: F.pdist(torch.cat([y[0], y[0]])),
    "saturated probabilities": lambda y: F.binary_cross_entropy(
        (600 * y).sigmoid(), torch.ones_like(y)
    ),
    "logits": lambda y: F.binary_cross_entropy_with_logits(99 * y, (y > 0).to(y), y[0, 0].detach()),
    "soft margin": lambda y: F.soft_margin_loss(99 * y, y.detach().sign()),
    "hardswish at its corners": lambda y: F.hardswish(y - y.detach() + 3),
    "glu": lambda y: F.glu(99 * y),
}


OF_A_CANCELLATION = {name: 1e-6 for name in HEADS if name.startswith("cdist")}
"""By products the distance of equal rows is the root of what rounding leaves of their squares."""


class Attend(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.qkv, self.name = nn.Linear(32, 96), name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return HEADS[self.name](y)


def inputs() -> tuple[torch.Tensor, ...]:
    return (torch.randn(2, 37, 32, generator=torch.Generator().manual_seed(1)),)


def case(name: str) -> Case:
    return Case(
        model=functools.partial(Attend, name), inputs=inputs, dtype=torch.float64,
        loss=torch.sum, options={"compiler": "eager"}, label=name,
    )  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_one_rank_has_eagers_gradients(name: str) -> None:
    check(name, compare_here(case(name)))


def test_two_ranks_have_eagers_gradients(ranks2: RankPool) -> None:
    compared = compare_all(ranks2, [case(name) for name in HEADS])
    for name, comparison in zip(HEADS, compared, strict=True):
        check(name, comparison)


def check(name: str, comparison: Comparison) -> None:
    rest = OF_A_CANCELLATION.get(name)
    comparison.check(loss=rest, outputs=rest, gradients=rest or 1e-9)
