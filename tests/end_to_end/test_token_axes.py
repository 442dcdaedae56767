"""Token axes that are cut, joined, shifted, looked up or sorted: split, and right."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.models import token_axes
from tests.models.token_axes import CONSTRUCTS, HIDDEN, VOCAB, Around
from tests.support.harness import Case, RankPool, compare_all
from tests.support.programs import lowered
from tests.support.sampling import one_in

ANNOUNCED = frozenset({("experts, order used", 2), ("experts, order used", 8)})
"""Constructs that still gather, and on how many ranks."""
FEW_BYTES = 2000
"""A whole sequence of hidden states is 12 KiB here."""


def mean_square(output: torch.Tensor) -> torch.Tensor:
    weights = torch.arange(output.numel(), dtype=output.dtype).view(output.shape).cos()
    return (output * weights).square().sum() + output.mean()


def case(name: str, causal: bool, seq_len: int) -> Case:
    return Case(
        model=functools.partial(Around, name, causal),
        inputs=functools.partial(token_axes.inputs, seq_len),
        loss=mean_square,
        dtype=torch.float64,
        options={"compiler": "eager"},
        label=f"{name}, {'zigzag' if causal else 'contiguous'}, {seq_len} tokens",
    )


def cases(seq_len: int, *causal: bool) -> list[Case]:
    return [case(name, each, seq_len) for name in CONSTRUCTS for each in causal]


@pytest.mark.slow  # on three ranks, where sizes coincide, below
def test_every_construct_is_right_on_two_ranks(ranks2: RankPool) -> None:
    for found in compare_all(ranks2, cases(13, True)):
        found.check()


def test_constructs_are_right_on_three_ranks_where_sizes_coincide(ranks3: RankPool) -> None:
    for found in compare_all(ranks3, one_in(6, cases(HIDDEN, False))):
        found.check()


@pytest.mark.slow
@pytest.mark.parametrize("seq_len", [6, 7, 8, 9, 10, 11, 12, 13, 14, HIDDEN, 24, VOCAB])
def test_every_construct_is_right_at_every_length(ranks3: RankPool, seq_len: int) -> None:
    for found in compare_all(ranks3, cases(seq_len, False, True)):
        found.check()


@pytest.mark.parametrize(("causal", "ranks"), [(False, 2), (True, 8)])
@pytest.mark.parametrize("name", one_in(3, CONSTRUCTS))
def test_no_whole_sequence_is_gathered(name: str, causal: bool, ranks: int) -> None:
    program = lowered(Around(name, causal), *token_axes.inputs(96), ranks=ranks)
    gathers = [m for m in program.plan.collectives if m.kind == "all_gather"]
    moved = [f"{m.reason}: {m.node}" for m in gathers if m.bytes_moved > FEW_BYTES]
    assert bool(moved) == ((name, ranks) in ANNOUNCED), moved
