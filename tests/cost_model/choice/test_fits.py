"""What is chosen for a budget, beside every choice that there is."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from ringfx.cost_model.choice import choose as choose_module
from ringfx.cost_model.choice.fits import Fitting
from ringfx.cost_model.choice.problem import Problem
from ringfx.cost_model.prediction.formulas import Phase
from ringfx.cost_model.prediction.predict import Prediction
from ringfx.ir.memory_peaks import Peaks
from ringfx.ir.memory_plan import (
    MemoryLayer,
    MemoryMask,
    MemoryMoment,
    MemoryTerm,
    MemoryTimeline,
)
from ringfx.ir.memory_timeline import in_order, peak
from tests.cost_model.choice.test_offload import HOST, planned


def fitting(layers: int) -> Fitting:
    """The problem of a small model whose layers can be kept, computed again and offloaded."""
    seen: list[Problem] = []
    refuse = choose_module.refuse_hopeless

    def noted(problem: Problem, *, advise: bool) -> None:
        seen.append(problem)
        refuse(problem, advise=advise)

    with mock.patch.object(choose_module, "refuse_hopeless", noted):
        plan = planned(profile=HOST, layers=layers, strategy="auto", gpu_memory="1GiB")
    assert len(plan.layers) == layers
    return seen[-1].at(2)


def traced() -> tuple[MemoryTimeline, list[Sequence[Prediction | None]]]:
    """Layers that are kept, computed again and offloaded."""
    found = fitting(5)
    menus = in_order(found.memory, found.sites, found.menus)
    return found.memory, [(*menu, None) for menu in menus if menu is not None]


def by_hand() -> tuple[MemoryTimeline, list[Sequence[Prediction | None]]]:
    """A checkpoint around two layers, and masks of which ranks take rows or keep all."""
    moments = [
        MemoryMoment(
            operator="", where="", bytes=(100, 7 * i + 1), layers=i, masks=min(i, 2),
            working=(i - 1,) if i else (0, 1, 2), again=(0, 1) if i < 3 else (),
        )
        for i in range(4)
    ]  # fmt: skip
    timeline = MemoryTimeline(
        seq_len=64,
        terms=(
            MemoryTerm(cause="parameters", tokens=0, is_split=False),
            MemoryTerm(cause="temporaries", tokens=1, is_split=True),
        ),
        moments=tuple(moments),
        layers=tuple(MemoryLayer(node=f"a{i}", keeps_result=i < 2) for i in range(3)),
        masks=(
            MemoryMask(bytes=4097, tokens=2, readers=(0, 2), is_kept=True),
            MemoryMask(bytes=63, tokens=1, readers=(1,), is_kept=True),
        ),
    )
    options = [
        Prediction(
            strategy="", kernel="", forward=Phase(), backward=Phase(), saved_bytes=90 + i,
            result_bytes=30, workspace_bytes=50 * i, own_queries=i > 0,
        )
        for i in range(3)
    ]  # fmt: skip
    return timeline, [[*options, None]] * 3


@pytest.mark.parametrize("made", [traced, by_hand])
def test_the_fast_sums_are_the_slow_ones(
    made: Callable[[], tuple[MemoryTimeline, list[Sequence[Prediction | None]]]],
) -> None:
    timeline, menus = made()
    at: Any = {"world_size": 2, "seq_len": timeline.seq_len + 3}
    peaks = Peaks(timeline, menus, **at)
    draw = random.Random(0)
    choices = [[draw.randrange(len(menu)) for menu in menus] for _ in range(200)]
    for picked, fast in zip(choices, peaks.of(np.array(choices)), strict=True):
        layers = [menu[i] for menu, i in zip(menus, picked, strict=True)]
        assert fast == peak(timeline, layers, **at).bytes


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
