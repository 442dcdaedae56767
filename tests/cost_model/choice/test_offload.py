"""What layers that are computed again keep waits in the host's memory, where that is cheapest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import ringfx
from ringfx.api import offline
from ringfx.cost_model.choice.whatif import Change, longest_sequence, replan
from ringfx.errors import InvalidArgument, OutOfMemory
from ringfx.ir.memory_timeline import REUSE, ROWS
from ringfx.ir.plan import Plan
from tests.cost_model.peak_memory.test_peak import Small
from tests.cost_model.sites import shipped

LAYERS, TOKENS, WIDTH = 6, 8192, 64
HOST = replace(shipped("cpu-default"), host_gbytes_per_s=10.0, host_gbytes=10.0)


def planned(
    tokens: int = TOKENS, ranks: int = 2, profile: Any = HOST, layers: int = LAYERS, **options: Any
) -> Plan:
    with offline():
        model = Small(WIDTH, layers, 512)
        ids = torch.empty(1, tokens, dtype=torch.int64)
    options = {"chunks": "none", "strategy": "simple", **options}
    return ringfx.plan(model, (ids, ids), world_size=ranks, profile=profile, **options)


def offloaded(plan: Plan) -> int:
    return sum(layer.offloaded for layer in plan.layers)


def test_hidden_states_and_outputs_wait_there_and_are_back_when_they_are_read() -> None:
    kept, moved = (planned(recompute="layers", offload=how) for how in ("none", "all"))
    each = TOKENS // 2 * WIDTH * 4
    assert [x.host_bytes for x in moved.layers] == [2 * each] * (LAYERS - 1) + [each]
    assert [x.host_result_bytes for x in moved.layers] == [each] * LAYERS
    # In the last layer's backward its own output is back, and what it starts from; then the peak
    # may be at another moment.
    saved = kept.memory.peak_bytes - moved.memory.peak_bytes
    assert 0.9 * each * (2 * (LAYERS - 1) - 1) < saved <= each * (2 * (LAYERS - 1) - 1)
    assert moved.offload_ms == pytest.approx(2 * sum(x.host_bytes for x in moved.layers) / 10e6)
    assert kept.step_ms is not None
    assert moved.step_ms == pytest.approx(kept.step_ms + moved.offload_ms)


@pytest.mark.parametrize(
    "options",
    [
        {"recompute": "none", "chunks": "auto"},
        {"recompute": "layers", "offload": "none", "optimizer": "adamw"},
        {"recompute": "attention", "offload": "none", "shard_states": True},
        {"recompute": "layers", "offload": "all", "ranks": 1},
        {"recompute": "attention", "offload": "all", "chunks": "all"},
        {"gpu_memory": "30MiB"},
    ],
    ids=str,
)
def test_the_parts_add_up_to_the_peak(options: dict[str, Any]) -> None:
    """By cause, by block of the model and over the program."""
    plan = planned(**options)
    memory = plan.memory
    assert max(memory.over_program) == memory.peak_bytes
    of_no_block = memory.of_kind("whole") + sum(
        part.bytes for part in memory.parts if part.cause.startswith((REUSE, ROWS))
    )
    blocks = sum(size for _, size in memory.by_block)
    assert blocks + of_no_block == pytest.approx(memory.peak_bytes, rel=1e-4)


def test_a_budget_takes_the_cheaper_of_the_host_and_attention_again() -> None:
    least = planned(recompute="layers", offload="none").memory.peak_bytes
    fast, slow = (
        planned(gpu_memory=round(0.95 * least), profile=replace(HOST, host_gbytes_per_s=speed))
        for speed in (10.0, 1e-4)
    )
    assert offloaded(fast) > 0
    assert not any(x.attention_again for x in fast.layers)
    assert offloaded(slow) == 0
    assert any(x.attention_again for x in slow.layers)
    for plan in (fast, slow):
        assert plan.memory.peak_bytes <= round(0.95 * least)
    assert (fast.step_ms or 0) < (slow.step_ms or 0)
    assert "of them keep waits in the host's memory" in str(fast)


def test_nothing_is_offloaded_that_a_budget_does_not_demand() -> None:
    assert offloaded(planned()) == 0
    assert offloaded(planned(gpu_memory="100GiB")) == 0


def test_what_is_offloaded_fits_the_host() -> None:
    each = 2 * TOKENS // 2 * WIDTH * 4
    for layers in (0, 2, 4):
        profile = replace(HOST, host_gbytes=(layers + 0.5) * each / 1e9)
        plan = planned(recompute="layers", offload="all", profile=profile)
        assert [x.offloaded for x in plan.layers[:-1]] == [i < layers for i in range(LAYERS - 1)]
        assert sum(x.host_bytes for x in plan.layers) <= 1e9 * (profile.host_gbytes or 0)


def test_a_profile_that_does_not_know_the_host_offloads_when_told_to() -> None:
    least = planned(recompute="attention", offload="none").memory.peak_bytes
    unknown = shipped("cpu-default")
    with pytest.raises(OutOfMemory):
        planned(gpu_memory=round(0.9 * least), profile=unknown)
    plan = planned(gpu_memory=round(0.9 * least), profile=unknown, offload="all")
    assert offloaded(plan) == LAYERS - 1
    assert plan.offload_ms == 0


def test_a_changed_plan_is_a_fresh_ones() -> None:
    budget = round(0.9 * planned(recompute="layers", offload="none").memory.peak_bytes)
    plan = planned(gpu_memory=budget)
    saved = Plan.from_json(plan.to_json())
    assert saved == plan
    for tokens, ranks in ((8192, 2), (6144, 2), (16384, 4)):
        fresh = planned(tokens, ranks, gpu_memory=budget)
        changed = replan(saved, Change(seq_len=tokens, world_size=ranks), HOST, "simple")
        assert offloaded(changed) == offloaded(fresh)
        assert changed.memory.peak_bytes == pytest.approx(fresh.memory.peak_bytes, rel=0.001)
        assert changed.offload_ms == pytest.approx(fresh.offload_ms, rel=0.01)


def test_longer_sequences_fit() -> None:
    budget = planned(4096, recompute="attention", offload="none").memory.peak_bytes
    with_it, without = (
        longest_sequence(planned(1024, gpu_memory=budget, offload=how), HOST, "simple")
        for how in ("auto", "none")
    )
    assert with_it > 1.1 * without
    assert planned(with_it - 64, gpu_memory=budget).memory.peak_bytes <= budget


def test_ranks_agree_on_what_is_offloaded() -> None:
    some = [planned(recompute="layers", offload=how).digest() for how in ("none", "all")]
    assert some[0] != some[1]


def test_what_is_no_choice_is_refused() -> None:
    with pytest.raises(
        InvalidArgument, match=r'offload="some" is unknown\. Do: use one of auto, none'
    ):
        planned(offload="some")
