"""Padding with a line's own tokens: those of its ends are moved, and nothing is gathered."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.models.pads import HIDDEN, OF_IMAGES, OF_TOKENS, Padded
from tests.support.harness import Case, RankPool, compare_all
from tests.support.sampling import one_in
from tests.support.split_here import split_here

Tensor = torch.Tensor
WAYS = [(64, 2), (63, 2), (64, 3), (65, 3)]
"""Tokens, or four times the rows, and ranks: they divide, or do not."""


def given(name: str, length: int) -> tuple[Tensor]:
    made = torch.Generator().manual_seed(length)
    shape = (3, HIDDEN, length // 4, 7) if name in OF_IMAGES else (3, HIDDEN, length)
    return (torch.randn(shape, generator=made),)


@pytest.mark.parametrize("name", [*OF_TOKENS, *OF_IMAGES])
def test_tokens_of_both_ends_pad_a_line(name: str) -> None:
    for length, ranks in WAYS:
        x = given(name, length)
        found = split_here(Padded(name), x, ranks)
        assert found.worst < 1e-9, (length, ranks)
        assert found.whole == []
        sizes = [m.bytes_moved for m in found.program.plan.collectives if m.kind.gathers]
        assert max(sizes, default=0) <= 8 * x[0].numel(), "the input's gradient alone"
        assert all("pad" not in reason for reason in found.gathered)


def weighed(y: Tensor) -> Tensor:
    return (y * torch.arange(y.numel(), dtype=y.dtype).view(y.shape).cos()).sum()


def cases(share: int) -> list[Case]:
    return [
        Case(
            model=functools.partial(Padded, name),
            inputs=functools.partial(given, name, 24 + i % 2),
            loss=weighed,
            dtype=torch.float64,
            options={"compiler": "eager" if i else "aot_eager"},
            label=name,
        )
        for i, name in enumerate(one_in(share, [*OF_TOKENS, *OF_IMAGES]))
    ]


@pytest.mark.slow  # on three ranks below
def test_they_are_equal_on_two_ranks(ranks2: RankPool) -> None:
    for comparison in compare_all(ranks2, cases(3)):
        comparison.check()


def test_they_are_equal_on_three_ranks(ranks3: RankPool) -> None:
    for comparison in compare_all(ranks3, cases(4)):
        comparison.check()
