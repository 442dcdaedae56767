"""Attention inside windows of tokens: whole windows are split, and attend on their own rank."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.end_to_end.test_grids import weighed
from tests.models import windows
from tests.models.windows import WINDOWS, Windows
from tests.support.harness import Case, RankPool, compare_all
from tests.support.programs import lowered
from tests.support.sampling import one_in

NOT_FOUND = ("neighbourhoods", "taps")
"""One query over the tokens around it, for each token."""
SPLIT = [name for name in WINDOWS if name not in NOT_FOUND]


def case(name: str, number: int) -> Case:
    return Case(
        model=functools.partial(Windows, name),
        inputs=functools.partial(windows.inputs, name, number),
        loss=weighed,
        dtype=torch.float64,
        options={"compiler": "eager", "on_unsupported": "gather"},
        label=f"{name}, {number} windows",
    )


@pytest.mark.slow  # on three ranks below
def test_windows_are_right_on_two_ranks(ranks2: RankPool) -> None:
    for found in compare_all(
        ranks2, [case(name, 4 - i % 2) for i, name in one_in(3, enumerate(SPLIT))]
    ):
        found.check()


def test_windows_are_right_on_three_ranks(ranks3: RankPool) -> None:
    for found in compare_all(
        ranks3, [case(name, 4 + i % 3) for i, name in one_in(3, enumerate(SPLIT[::-1]))]
    ):
        found.check()


@pytest.mark.parametrize(
    "name",
    [
        "apart",
        "with last",
        "causal",
        "shifted",
        "look back",
        "look around",
        "unfolded",
        "image",
        "shifted image",
        "by product",
    ],
)
def test_windows_attend_where_they_are(name: str) -> None:
    """Nothing but halos and sums is sent."""
    program = lowered(Windows(name), *windows.inputs(name, 6), ranks=2)
    assert all(layer.is_local for layer in program.plan.layers)
    assert not any(m.kind.gathers for m in program.plan.collectives)


def test_windows_that_ask_for_few_pooled_queries_stay_where_they_are() -> None:
    """The queries are few and gathered; what a window gives them is the window's own."""
    given = windows.inputs("pooled queries", 4)
    program = lowered(Windows("pooled queries"), *given, ranks=2)
    assert all(layer.is_local for layer in program.plan.layers)
    tokens = given[0].numel() * given[0].element_size()
    assert sum(m.bytes_moved for m in program.plan.collectives if m.kind.gathers) <= tokens / 8
