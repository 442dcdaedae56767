"""One memory from every way in: a changed plan's is a fresh plan's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ringfx
from ringfx.api import offline
from ringfx.cost_model import choose
from ringfx.cost_model.choice.whatif import Change, longest_sequence, replan, sweep
from ringfx.cost_model.prediction.predict import predict
from ringfx.errors import OutOfMemory
from ringfx.ir import tiles
from ringfx.ir.attention_spec import AttentionSpec
from ringfx.ir.memory_timeline import flat
from ringfx.ir.plan import Plan
from ringfx.ir.tiles import Expr
from tests.cost_model.peak_memory.test_peak import Small
from tests.cost_model.sites import causal_site, shipped

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


def test_parameters_and_gradients_are_refused_before_the_model_is_traced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Budgets that hold the parameters, and not what training adds to them."""
    with offline():
        size = sum(x.numel() * x.element_size() for x in Small(64, 3, 512, False).parameters())
    monkeypatch.setattr("ringfx.api.trace", None)
    with pytest.raises(OutOfMemory, match=r"parameters, gradients alone take .* on each rank"):
        _fresh(1024, 2, gpu_memory=2 * size - 1)
    with pytest.raises(OutOfMemory, match=r"gradients and optimizer state alone take"):
        _fresh(1024, 2, gpu_memory=4 * size - 1, optimizer="adamw")


@pytest.mark.parametrize("unused", [False, True])
def test_what_gets_no_gradient_is_not_counted_before_the_model_is_traced(unused: bool) -> None:
    """A part that the call does not use, or that is frozen, costs its parameters alone."""
    with offline():
        model = Small(64, 3, 512, False)
        model.extra = torch.nn.Linear(2048, 2048)
        model.extra.requires_grad_(unused)
        ids = torch.empty(1, 256, dtype=torch.int64)
    size = sum(x.numel() * x.element_size() for x in model.parameters())
    budget = size + 3 * 2**22  # under twice the parameters, and enough
    assert budget < 2 * size
    plan = ringfx.plan(model, (ids, ids), world_size=2, profile=CPU.name, gpu_memory=budget)
    assert plan.memory.peak_bytes <= budget


def test_a_search_for_what_fits_looks_at_few_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a layer keeps bounds the number of ranks and the length, without a look at its mask."""
    window: Expr = ("lt", ("sub", tiles.Q, tiles.K), ("const", 4096))
    spec = AttentionSpec(scale=0.1, q_len=2**20, kv_len=2**20, keep=("and", tiles.CAUSAL, window))
    sites = [causal_site(i, spec=spec) for i in range(32)]
    looked_at: list[int] = []

    def counted(*args: Any) -> Any:
        looked_at.append(1)
        return predict(*args)

    monkeypatch.setattr("ringfx.cost_model.choice.candidates.predict", counted)
    with pytest.raises(OutOfMemory, match=r"(?s)3 ranks or more.*tokens or fewer"):
        choose(
            sites, world_size=2, profile=shipped("h100-sxm-published"), gpu_memory=600 * 2**30,
            memory=flat(sites, whole=2**30, split=2**40, world_size=1),
        )  # fmt: skip
    # Of four strategies each, and of three in more groups of heads; by halves alone, 17 * 7.
    assert len(looked_at) <= 11 * 7


@pytest.mark.parametrize("ranks", [10**6, 100_003])
def test_any_number_of_ranks_is_planned_in_steps_that_do_not_grow_with_it(ranks: int) -> None:
    """More ranks than tokens among them, and a prime."""
    fresh = _fresh(4096, ranks)
    changed = replan(_fresh(4096, 2), Change(world_size=ranks), CPU)
    assert fresh.world_size == changed.world_size == ranks
    assert [x.strategy for x in fresh.layers] == [x.strategy for x in changed.layers]
