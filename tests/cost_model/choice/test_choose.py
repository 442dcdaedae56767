from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import pytest

from ringfx.cost_model import choose
from ringfx.cost_model.choice.budget import Menu, assign, peak, smallest
from ringfx.cost_model.prediction.formulas import Phase
from ringfx.cost_model.prediction.predict import Prediction
from ringfx.errors import InvalidArgument, OutOfMemory, StrategyRefused
from ringfx.ir.memory_timeline import flat
from ringfx.ir.plan import LayerPlan
from ringfx.strategies import STRATEGIES
from tests.cost_model.sites import causal_site, full_site, shipped

H100 = shipped("h100-sxm-published")


def _choose(*sites: Any, world_size: int = 8, **options: Any) -> tuple[LayerPlan, ...]:
    settings = {"profile": H100, **options}
    return choose(sites, world_size=world_size, **settings)


def _option(time: float, saved: int, workspace: int) -> Prediction:
    return Prediction(
        strategy=f"{time}",
        kernel="flash",
        forward=Phase(compute_s=time),
        backward=Phase(),
        saved_bytes=saved,
        workspace_bytes=workspace,
    )


# --- the choice --------------------------------------------------------------------------------


def test_without_a_budget_every_layer_takes_its_fastest() -> None:
    for layer in _choose(causal_site(0), full_site(1, 1024), causal_site(2, 2**20)):
        alternatives = [
            _choose(layer.site, strategy=name)[0].total_ms
            for name in STRATEGIES
            if STRATEGIES[name].admits(layer.site, 8) is None
        ]
        assert layer.total_ms == min(alternatives)


def test_the_layers_come_back_in_order_with_their_sites() -> None:
    sites = [causal_site(i, 1024 * (i + 1)) for i in range(5)]
    assert [layer.site for layer in _choose(*sites)] == sites


def test_one_rank_takes_the_local_kernel_and_says_so() -> None:
    (layer,) = _choose(causal_site(), world_size=1)
    assert layer.strategy == "production"
    assert layer.reason == "one rank: the local kernel"
    assert layer.communication_ms == 0


def test_the_same_plan_comes_from_every_run() -> None:
    sites = [full_site(i, 512 if i % 2 else 1024, heads=12) for i in range(12)]
    free = _choose(*sites)
    budget = sum(x.saved_bytes for x in free) + max(x.workspace_bytes for x in free) - 1
    plans = {_choose(*sites, gpu_memory=budget) for _ in range(3)}
    assert len(plans) == 1
    assert plans != {free}


def test_a_tight_budget_takes_less_memory_and_says_what_it_costs() -> None:
    sites = [full_site(i, 1024, heads=12) for i in range(3)]
    free = _choose(*sites)
    need = sum(x.saved_bytes for x in free) + max(x.workspace_bytes for x in free)
    tight = _choose(*sites, gpu_memory=need - 1)
    assert sum(x.total_ms for x in tight) >= sum(x.total_ms for x in free)
    assert sum(x.saved_bytes for x in tight) + max(x.workspace_bytes for x in tight) < need
    assert any("fastest that fits" in x.reason and "more" in x.reason for x in tight)


def test_memory_outside_attention_counts_against_the_budget() -> None:
    site = causal_site()
    (layer,) = _choose(site, gpu_memory=2**30)
    with pytest.raises(OutOfMemory):
        _choose(site, gpu_memory=2**30, memory=flat([site], whole=2**30 - layer.saved_bytes))
    split = flat([site], split=2**30 - layer.saved_bytes, world_size=8)
    with pytest.raises(OutOfMemory):
        _choose(site, gpu_memory=2**30, memory=split)


@pytest.mark.parametrize("seed", range(30))
def test_the_choice_under_a_budget_is_exact(seed: int) -> None:
    """Against all assignments, with repeated menus, saved bytes and workspaces that differ."""
    rng = random.Random(seed)

    def menu() -> Menu:
        options = [
            _option(rng.randint(1, 50), rng.randint(0, 40) * 2**20, rng.randint(0, 60) * 2**20)
            for _ in range(rng.randint(1, 4))
        ]
        return tuple(sorted(options, key=lambda o: o.total_ms))

    kinds = [menu() for _ in range(3)]
    menus = [rng.choice(kinds) for _ in range(6)]
    plans = list(itertools.product(*(range(len(m)) for m in menus)))
    peaks = {plan: peak(menus, plan) for plan in plans}
    least = min(peaks.values())
    assert peaks[smallest(menus)] == least
    assert assign(menus, least - 1) is None
    for room in (least, (least + max(peaks.values())) // 2, max(peaks.values())):
        picked = assign(menus, room)
        assert picked is not None
        assert peaks[picked] <= room

        def time(plan: tuple[int, ...]) -> float:
            return sum(m[i].total_ms for m, i in zip(menus, plan, strict=True))

        # Room for the solver's margin: what only fits to the last byte may be passed over.
        best = (
            min(time(plan) for plan in plans if peaks[plan] <= room * (1 - 2e-6))
            if room > least
            else time(picked)
        )
        assert time(picked) <= best * (1 + 1e-9)


# --- the user's word ---------------------------------------------------------------------------


def test_a_strategy_by_name_holds_for_every_layer() -> None:
    layers = _choose(causal_site(0), causal_site(1), strategy="simple")
    assert [x.strategy for x in layers] == ["simple", "simple"]
    assert layers[0].reason.startswith('requested by strategy="simple"; ')
    assert layers[0].reason.endswith("faster")


def test_the_last_glob_that_matches_wins_and_the_rest_stays_free() -> None:
    rules = {"model.*": "collective", "*.1.self_attn": "auto", "*.2.*": "simple"}
    names = [x.strategy for x in _choose(*map(causal_site, range(3)), strategy=rules)]
    assert names[0] == "collective"
    assert names[1] == _choose(causal_site(1))[0].strategy
    assert names[2] == "simple"


def test_an_unknown_strategy_lists_the_choices() -> None:
    names = "auto, simple, collective, production, ulysses"
    message = f"unknown strategy 'fastest'. Do: use one of {names}."
    for strategy in ("fastest", {"*": "fastest"}):
        with pytest.raises(InvalidArgument) as caught:
            _choose(causal_site(), strategy=strategy)
        assert str(caught.value) == message


def test_a_glob_that_matches_nothing_lists_the_layers() -> None:
    with pytest.raises(InvalidArgument) as caught:
        _choose(*map(causal_site, range(6)), strategy={"decoder.*": "simple"})
    assert str(caught.value) == (
        "strategy: the glob 'decoder.*' matches no attention layer."
        " Layers: model.layers.0.self_attn, model.layers.1.self_attn,"
        " model.layers.2.self_attn, model.layers.3.self_attn, ... (6 in all)."
        " Do: give a glob that matches one of them; `ringfx explain MODEL` lists all."
    )


def test_a_strategy_that_cannot_run_is_refused_with_numbers_and_remedies() -> None:
    site = causal_site(7, heads=12, kv_heads=12)
    with pytest.raises(StrategyRefused) as caught:
        _choose(site, strategy={"model.layers.7.*": "ulysses"})
    first, second, third = str(caught.value).split("\n")
    assert first == (
        "model.layers.7.self_attn (/opt/models/llama/modeling_llama.py:254,"
        ' found as "sdpa"): "ulysses" needs heads % ranks == 0; here 12 heads, 8 ranks.'
    )
    assert second.startswith(
        "  Admissible: collective (all-gather of K/V), production (overlapped ring), "
        "simple (reference ring). Cheapest: "
    )
    assert ", predicted " in second
    assert third == (
        "  Do: drop the override for model.layers.7.*,"
        ' or use a number of ranks that divides them (2, 3, 4, 6, 12), or "production".'
    )


def test_a_layer_that_no_strategy_can_split_is_refused_with_every_reason() -> None:
    only = {"ulysses": STRATEGIES["ulysses"]}
    with pytest.raises(StrategyRefused) as caught:
        _choose(causal_site(heads=12), strategies=only)
    assert str(caught.value).split("\n")[1] == (
        '  "ulysses" needs heads % ranks == 0; here 12 heads, 8 ranks.'
        ' Do: use a number of ranks that divides them (2, 3, 4, 6, 12), or "production".'
    )
    assert "no strategy can split it over 8 ranks" in str(caught.value)


# --- when nothing fits ---------------------------------------------------------------------------


def test_when_nothing_fits_the_nearest_that_would_is_named_and_does_fit() -> None:
    sites = [causal_site(i, 2**20) for i in range(32)]
    budget = 40 * 2**30
    outside = flat(sites, whole=2**30, split=2**30, world_size=8)
    with pytest.raises(OutOfMemory) as caught:
        _choose(*sites, gpu_memory=budget, memory=outside)
    first, second, *do = str(caught.value).split("\n")
    assert first.startswith("no choice of strategies fits: 8 ranks need at least ")
    assert first.endswith(" each, the budget is 40.0 GiB.")
    assert second.startswith("  Made of: saved by attention ")
    assert second.endswith(", outside attention 2.00 GiB.")
    assert do[0] == "  Do one of these:"
    more_ranks, fewer_tokens = (line.replace(",", "").split() for line in do[1:])
    assert more_ranks[1:4] == ["ranks", "or", "more"]
    assert fewer_tokens[1:4] == ["tokens", "or", "fewer"]
    ranks, tokens = int(more_ranks[0]), int(fewer_tokens[0])
    _choose(*sites, world_size=ranks, gpu_memory=budget, memory=outside)
    with pytest.raises(OutOfMemory):
        _choose(*sites, world_size=ranks - 1, gpu_memory=budget, memory=outside)
    shorter = [replace(s, spec=replace(s.spec, q_len=tokens, kv_len=tokens)) for s in sites]
    _choose(*shorter, gpu_memory=budget, memory=outside)
    assert tokens > 2**18


def test_when_parameters_alone_are_too_large_nothing_is_promised() -> None:
    with pytest.raises(OutOfMemory) as caught:
        _choose(causal_site(), gpu_memory=2**30, memory=flat([causal_site()], whole=2**31))
    assert str(caught.value).endswith(
        "  Do: give more memory: outside attention alone take 2.00 GiB."
    )


def test_a_budget_of_a_few_bytes_is_asked_for_its_unit() -> None:
    with pytest.raises(
        OutOfMemory, match=r'80 B \(a number without a unit is bytes; write "80GB"\)'
    ):
        _choose(causal_site(), gpu_memory=80)
    with pytest.raises(OutOfMemory) as caught:
        _choose(causal_site(), gpu_memory=1000)
    assert "unit" not in str(caught.value)
