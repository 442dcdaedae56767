"""Layers that backward computes again: as many as the budget demands, from every way in."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ringfx
from ringfx.api import offline
from ringfx.cost_model.choice.whatif import Change, longest_sequence, replan
from ringfx.errors import InvalidArgument, OutOfMemory
from ringfx.ir.plan import Plan
from tests.cost_model.peak_memory.test_peak import Small
from tests.cost_model.sites import budget_for, shipped
from tests.support.sampling import one_in

CPU = shipped("cpu-default")
LAYERS = 6


def planned(tokens: int = 8192, ranks: int = 2, checkpoint: bool = False, **options: Any) -> Plan:
    with offline():
        model = Small(64, LAYERS, 512, checkpoint)
        ids = torch.empty(1, tokens, dtype=torch.int64)
    return ringfx.plan(model, (ids, ids), world_size=ranks, profile=CPU.name, **options)


def again(plan: Plan) -> int:
    return sum(layer.recomputed for layer in plan.layers)


def test_all_layers_again_need_what_a_checkpoint_around_each_needs() -> None:
    ours, users = planned(recompute="layers"), planned(checkpoint=True)
    assert again(ours) == LAYERS
    assert ours.memory.peak_bytes == pytest.approx(users.memory.peak_bytes, rel=0.05)
    assert ours.memory.peak_bytes < 0.6 * planned().memory.peak_bytes


def test_as_many_layers_as_the_budget_demands_and_no_more() -> None:
    most, least = (planned(recompute=how).memory.peak_bytes for how in ("none", "attention"))
    counts, times = [], []
    for share in (1.0, 0.8, 0.6, 0.4, 0.2, 0.05):
        budget = budget_for(round(least + share * (most - least)))
        plan = planned(gpu_memory=budget, chunks="none")
        assert plan.memory.peak_bytes <= budget
        counts.append(again(plan))
        times.append(plan.step_ms or 0.0)
    assert counts[0] == 0
    assert counts[-1] >= LAYERS - 1  # what the last layer keeps goes first in backward
    assert counts == sorted(counts)
    assert times == sorted(times)
    with pytest.raises(OutOfMemory):
        planned(gpu_memory=least // 2)


def test_attention_is_run_again_only_where_the_rest_is_not_enough() -> None:
    options: Any = {"chunks": "none", "strategy": "simple"}  # of which there is one way
    layers, attention = (
        planned(recompute=how, **options).memory.peak_bytes for how in ("layers", "attention")
    )
    assert attention < layers
    enough = planned(gpu_memory=budget_for(layers), **options)
    assert not any(layer.attention_again for layer in enough.layers)
    budget = attention + (layers - attention) // 8
    short = planned(gpu_memory=budget, **options)
    assert any(layer.attention_again for layer in short.layers)
    assert short.memory.peak_bytes <= budget
    assert (short.step_ms or 0) > (enough.step_ms or 0)
    assert "attention too" in str(short)


def test_a_budget_for_one_layer_fewer_is_not_met_by_it() -> None:
    """The choice is tight: with one layer more kept, the budget would be exceeded."""
    least = planned(recompute="layers", chunks="none").memory.peak_bytes
    plan = planned(gpu_memory=round(1.3 * least), chunks="none")
    assert 0 < again(plan) < LAYERS
    more = [layer.again_ms for layer in plan.layers if layer.recomputed]
    fewer = replan(plan, Change(gpu_memory=2**50), CPU)
    assert again(fewer) == 0
    assert fewer.memory.peak_bytes > round(1.3 * least)
    assert min(more) > 0


@pytest.mark.parametrize("recompute", one_in(3, ["auto", "layers", "attention"]))
def test_a_changed_plan_is_a_fresh_ones(recompute: str) -> None:
    budget = round(1.3 * planned(recompute="layers", chunks="none").memory.peak_bytes)
    options: Any = {"recompute": recompute, "gpu_memory": budget, "chunks": "none"}
    plan = planned(**options)
    saved = Plan.from_json(plan.to_json())
    assert saved == plan
    for tokens, ranks in ((8192, 2), (6144, 2), (16384, 4)):
        fresh = planned(tokens, ranks, **options)
        changed = replan(saved, Change(seq_len=tokens, world_size=ranks), CPU)
        assert again(changed) == again(fresh)
        assert changed.memory.peak_bytes == pytest.approx(fresh.memory.peak_bytes, rel=0.001)
        assert changed.again_ms == pytest.approx(fresh.again_ms, rel=0.05)
        assert changed.step is not None
        assert fresh.step is not None
        assert changed.step.total_ms == pytest.approx(fresh.step.total_ms, rel=0.05)


def test_longer_sequences_fit() -> None:
    budget = planned(4096).memory.peak_bytes
    with_it, without = (
        longest_sequence(planned(1024, gpu_memory=budget, recompute=how, chunks="none"), CPU)
        for how in ("auto", "none")
    )
    assert with_it > 1.4 * without
    assert again(planned(with_it - 64, gpu_memory=budget, chunks="none")) == LAYERS


def test_layers_that_the_user_checkpoints_stay_as_they_are() -> None:
    plan = planned(checkpoint=True, recompute="layers")
    assert again(plan) == 0
    assert max(plan.memory.over_program) == plan.memory.peak_bytes
    assert 'recompute="layers" has no effect: the model checkpoints parts of itself' in str(plan)


def test_without_gradients_nothing_is_computed_again() -> None:
    with torch.no_grad():
        plan = planned(recompute="layers")
    assert again(plan) == 0
    assert max(plan.memory.over_program) == plan.memory.peak_bytes


def test_ranks_agree_on_what_is_computed_again() -> None:
    assert planned(recompute="layers").digest() != planned(recompute="none").digest()


def test_the_plan_says_what_it_costs() -> None:
    plan = planned(recompute="layers", gpu_memory="1GiB", optimizer="adamw")
    text = str(plan)
    assert "fits 1.00 GiB: " in text
    assert "of memory at the peak, with adamw" in text
    assert f"{LAYERS} of {LAYERS} layers are computed again in backward, attention apart" in text
    assert "tokens a second" in text
    assert "time of a step on one rank" in text


def test_what_is_no_choice_is_refused() -> None:
    with pytest.raises(
        InvalidArgument, match=r'recompute="some" is unknown\. Do: use one of auto, none'
    ):
        planned(recompute="some")
