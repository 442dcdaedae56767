"""What is chosen for a budget, beside every choice that there is."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import pytest

from ringfx.cost_model.choice import choose as choose_module
from ringfx.cost_model.choice.fits import Fitting
from ringfx.cost_model.choice.problem import Problem
from ringfx.ir.memory_peaks import Peaks
from ringfx.ir.memory_timeline import in_order, peak
from tests.cost_model.choice.test_offload import HOST, planned


def fitting(layers: int) -> Fitting:
    """The problem of a small model whose layers can be kept, computed again and offloaded."""
    seen: list[Problem] = []
    refuse = choose_module.refuse_hopeless

    def noted(problem: Problem) -> None:
        seen.append(problem)
        refuse(problem)

    with mock.patch.object(choose_module, "refuse_hopeless", noted):
        plan = planned(profile=HOST, layers=layers, strategy="auto", gpu_memory="1GiB")
    assert len(plan.layers) == layers
    return seen[-1].at(2)


def test_the_fast_sums_are_the_slow_ones() -> None:
    found = fitting(5)
    peaks = Peaks(found.memory, world_size=2, seq_len=found.seq_len)
    draw = random.Random(0)
    for _ in range(200):
        held = [draw.choice([*menu, None]) for menu in found.menus]
        layers = in_order(found.memory, found.sites, held)
        expected = peak(found.memory, layers, world_size=2, seq_len=found.seq_len)
        assert peaks.of(layers) == expected.bytes


def different(found: Fitting) -> Fitting:
    """With one option of each kind, the fastest: few enough to try all choices."""
    menus = []
    for menu in found.menus:
        kinds = {}
        for option in menu:
            kinds.setdefault((option.recomputed, option.attention_again, option.offloaded), option)
        menus.append(tuple(kinds.values()))
    return replace(found, menus=menus)


def every(found: Fitting) -> Iterator[tuple[int, ...]]:
    return itertools.product(*(range(len(menu)) for menu in found.menus))


@pytest.mark.parametrize("speed", [0.05, 1.0, 10.0])
def test_the_choice_is_within_5_percent_of_the_best(speed: float) -> None:
    with mock.patch(f"{__name__}.HOST", replace(HOST, host_gbytes_per_s=speed)):
        found = different(fitting(4))
    costs = {picked: found.time(picked) for picked in every(found)}
    sizes = {picked: found.peak(picked).bytes for picked in costs}
    least, most = min(sizes.values()), found.peak(tuple(0 for _ in found.menus)).bytes
    beside_best = []
    for share in range(20):
        budget = least + share * (most - least) // 20
        picked = found.fastest(budget)
        assert picked is not None
        assert sizes[picked] <= budget
        best = min(cost for choice, cost in costs.items() if sizes[choice] <= budget)
        beside_best.append(costs[picked] / best)
    assert max(beside_best) <= 1.05
    assert sum(beside_best) / len(beside_best) <= 1.01
    assert found.fastest(least - 1) is None
