"""One memory from every way in: a changed plan's is a fresh plan's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ringfx
from ringfx.api import offline
from ringfx.cost_model.whatif import Change, longest_sequence, replan, sweep
from ringfx.errors import OutOfMemory
from ringfx.plan import Plan
from tests.cost_model.sites import shipped
from tests.cost_model.test_memory import Small

CPU = shipped("cpu-default")


def _fresh(tokens: int, ranks: int, checkpoint: bool = False, **options: Any) -> Plan:
    with offline():
        model = Small(64, 3, 512, checkpoint)
        ids = torch.empty(1, tokens, dtype=torch.int64)
    return ringfx.plan(model, (ids, ids), world_size=ranks, profile=CPU.name, **options)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_changed_plan_needs_what_a_fresh_one_does(checkpoint: bool) -> None:
    """Short, parameters are most of it; long, the logits: the peak lies elsewhere."""
    plans = {at: _fresh(*at, checkpoint) for at in ((256, 2), (8192, 2), (32768, 8))}
    for plan in plans.values():
        saved = Plan.from_json(plan.to_json())
        assert saved == plan
        for (tokens, ranks), fresh in plans.items():
            change = Change(seq_len=tokens, world_size=ranks)
            changed = replan(saved, change, CPU)
            (swept,) = sweep(saved, [change], CPU)
            assert changed.memory.peak_bytes == pytest.approx(fresh.memory.peak_bytes, rel=0.001)
            assert isinstance(swept, Plan)
            assert swept.memory == changed.memory


def test_no_change_keeps_the_memory_as_it_is() -> None:
    plan = _fresh(4096, 2)
    assert replan(plan, Change(), CPU).memory == plan.memory


def test_the_longest_sequence_is_a_fresh_plans() -> None:
    budget = _fresh(8192, 2).memory.peak_bytes
    longest = longest_sequence(_fresh(1024, 2, gpu_memory=budget), CPU)
    assert longest >= 8192 - 8
    assert _fresh(round(0.999 * longest), 2, gpu_memory=budget).memory.peak_bytes <= budget
    with pytest.raises(OutOfMemory):
        _fresh(longest + 64, 2, gpu_memory=budget)


def test_parameters_alone_are_refused_before_the_model_is_traced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ringfx.api.trace", None)
    with pytest.raises(OutOfMemory, match=r"(?s)parameters alone take .* more ranks do not help"):
        _fresh(1024, 2, gpu_memory=2**10)


@pytest.mark.parametrize("ranks", [10**6, 100_003])
def test_any_number_of_ranks_is_planned_in_steps_that_do_not_grow_with_it(ranks: int) -> None:
    """More ranks than tokens among them, and a prime."""
    fresh = _fresh(4096, ranks)
    changed = replan(_fresh(4096, 2), Change(world_size=ranks), CPU)
    assert fresh.world_size == changed.world_size == ranks
    assert [x.strategy for x in fresh.layers] == [x.strategy for x in changed.layers]
