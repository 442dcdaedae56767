"""Scans, flips, softmaxes and reductions along the tokens: equal, and nothing is gathered."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from ringfx.ir.values import CommKind
from tests.models.along_tokens import ALONG, HIDDEN, Along
from tests.support.harness import Case, RankPool, compare_all
from tests.support.sampling import one_in
from tests.support.split_here import split_here


def inputs(length: int) -> tuple[torch.Tensor]:
    return (torch.randn(2, length, HIDDEN, generator=torch.Generator().manual_seed(length)),)


WAYS = [(37, 3, True), (24, 2, False), (23, 2, True), (13, 3, False)]
"""Length, ranks, and whether attention is causal: then each rank has two runs."""


@pytest.mark.parametrize("name", ALONG)
def test_what_runs_along_the_tokens_is_equal_and_stays(name: str) -> None:
    first = [*ALONG].index(name) % len(WAYS)
    for length, ranks, causal in one_in(len(WAYS), [*WAYS[first:], *WAYS[:first]]):
        found = split_here(Along(name, causal), inputs(length), ranks)
        assert found.worst < 1e-10, (length, ranks, causal)
        assert found.gathered == []
        assert found.whole == []


def test_a_scan_exchanges_one_value_a_channel_of_each_run() -> None:
    for causal, runs in ((False, 1), (True, 2)):
        found = split_here(Along("running_sum", causal), inputs(13), 3)
        scans = [m for m in found.program.plan.collectives if m.reason == "a value of each run"]
        assert [m.kind for m in scans] == [CommKind.ALL_REDUCE]
        assert scans[0].bytes_moved == 3 * runs * 2 * HIDDEN * torch.float64.itemsize


def test_a_weight_that_is_read_elsewhere_too_ends_no_other_axis() -> None:
    """The transform's filter is made of a bias of the model: its channels stay those of others."""
    found = split_here(Along("transform_and_back"), inputs(24), 2)
    exchanges = [m for m in found.program.plan.collectives if m.kind is CommKind.ALL_TO_ALL]
    assert len(exchanges) == 4, "there and back, forward and backward"


def weighed(found: Any) -> torch.Tensor:
    parts = (
        [found]
        if isinstance(found, torch.Tensor)
        else [y for y in found if y.dtype.is_floating_point]
    )
    return torch.stack(
        [(y * torch.arange(y.numel(), dtype=y.dtype).view(y.shape).cos()).sum() for y in parts]
    ).sum()


def test_what_runs_along_the_tokens_is_equal_on_real_ranks(ranks3: RankPool) -> None:
    cases = [
        Case(
            model=functools.partial(Along, name, i % 2 == 0),
            inputs=functools.partial(inputs, 13),
            loss=weighed,
            dtype=torch.float64,
            options={"compiler": "aot_eager"},
            label=name,
        )
        for i, name in enumerate(one_in(7, ALONG))
    ]
    for comparison in compare_all(ranks3, cases):
        comparison.check()
