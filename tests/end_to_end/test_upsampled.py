"""Transposed convolutions along the tokens: ranks exchange what kernels reach, and nothing more."""

from __future__ import annotations

import functools

import pytest
import torch

from ringfx.comm import halo_transposed
from ringfx.ir.values import CommKind
from tests.models.upsampled import HIDDEN, OF_IMAGES, OF_TOKENS, DownAndUp, Upsampled
from tests.support.harness import RankPool, compare_all
from tests.support.named_cases import Made, named_cases
from tests.support.split_here import split_here

Tensor = torch.Tensor
WAYS = [(16, 2), (17, 2), (18, 3), (23, 3)]
"""Tokens, or rows, and ranks: they divide, or do not."""


def given(name: str, length: int) -> tuple[Tensor]:
    made = torch.Generator().manual_seed(length)
    shape = (3, HIDDEN, length, 5) if name in OF_IMAGES else (3, HIDDEN, length)
    return (torch.randn(shape, generator=made),)


@pytest.mark.parametrize("name", [*OF_TOKENS, *OF_IMAGES])
def test_a_transposed_convolution_exchanges_what_its_kernel_reaches(name: str) -> None:
    for length, ranks in WAYS:
        found = split_here(Upsampled(name), given(name, length), ranks)
        assert found.worst < 1e-9, (length, ranks)
        assert found.whole == []
        assert found.gathered == []
        calls = [n.target for n in found.program.local.graph_module.graph.nodes]
        assert halo_transposed.transposed_tokens in calls


def test_tokens_that_overlap_are_one_exchange() -> None:
    program = split_here(Upsampled("overlapping"), given("overlapping", 16), 2).program
    kinds = [m.kind for m in program.plan.collectives if not m.in_backward]
    assert kinds == [CommKind.HALO_EXCHANGE] * 3, "one a layer"
    alone = split_here(Upsampled("side by side"), given("side by side", 16), 2).program
    kinds = [m.kind for m in alone.plan.collectives if not m.in_backward]
    assert kinds == [CommKind.HALO_EXCHANGE] * 2


def test_what_reaches_beyond_the_next_run_is_gathered_and_equal() -> None:
    found = split_here(Upsampled("wide"), given("wide", 4), 4)
    assert found.worst < 1e-9


def test_fewer_tokens_in_the_middle_are_split_with_all_around_them() -> None:
    for length, ranks in ((24, 2), (96, 3), (92, 3)):
        found = split_here(DownAndUp(), given("", length), ranks)
        assert found.worst < 1e-9, (length, ranks)
        assert found.whole == []
        assert found.gathered == []


def made(name: str, i: int) -> Made:
    return functools.partial(Upsampled, name), functools.partial(given, name, 18 + i % 2)


@pytest.mark.slow  # on three ranks below
def test_they_are_equal_on_two_ranks(ranks2: RankPool) -> None:
    for comparison in compare_all(ranks2, named_cases([*OF_TOKENS, *OF_IMAGES], 5, made)):
        comparison.check()


def test_they_are_equal_on_three_ranks(ranks3: RankPool) -> None:
    for comparison in compare_all(ranks3, named_cases([*OF_TOKENS, *OF_IMAGES][1:], 8, made)):
        comparison.check()
