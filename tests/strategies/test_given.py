"""Strategies and rules that a user gives, without ranks: what is chosen, predicted, refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import ringfx
from examples import own_rule, own_strategy
from ringfx.cli.main import app
from ringfx.compile.settings import Settings
from ringfx.cost_model.prediction.footprint import Calls
from ringfx.cost_model.prediction.formulas import Phase
from ringfx.cost_model.prediction.kernel_choice import unmeasured
from ringfx.cost_model.prediction.predict import predict
from ringfx.cost_model.prediction.rank_share import Local
from ringfx.errors import InvalidArgument, NoAxisRule, StrategyRefused
from ringfx.ir.note import texts_of
from ringfx.passes.axes.rules.pattern import axes
from ringfx.strategies import Refusal
from ringfx.strategies.given import require_strategies
from ringfx.strategies.keys import key_of, strategy_of
from tests.cost_model.sites import causal_site, shipped

HALVES = own_strategy.ALL_GATHER_HALVES
EPYC = shipped("amd-epyc-2-ranks")


def _free(*args: Any) -> Phase:
    return Phase(compute_s=1e-9)


def _nothing(local: Local, calls: Calls) -> Iterator[int]:
    yield 1000 if calls.direction == "forward" else 3000


FREE = dataclasses.replace(HALVES, name="free", time=_free, memory=_nothing)
TABLE = ringfx.STRATEGIES | {"free": FREE}


def _plan(**options: Any) -> ringfx.Plan:
    with torch.device("meta"):
        model, x = own_strategy.Attention(64, 4, 4), torch.zeros(1, 128, 64)
    return ringfx.plan(model, (x,), world_size=2, **{"profile": "cpu-default"} | options)


# --- choosing -------------------------------------------------------------------------------------


def test_the_example_is_chosen_where_its_formula_is_cheapest_and_nowhere_else() -> None:
    lengths = own_strategy.SHORT, own_strategy.LONG
    short, long = (own_strategy.planned(n).layers[0] for n in lengths)
    assert short.strategy != "all_gather_halves"
    assert long.strategy == "all_gather_halves"
    for layer in (short, long):
        where = own_strategy.RANKS, own_strategy.PROFILE
        mine = predict(layer.site, HALVES, *where)
        best = predict(layer.site, own_strategy.STRATEGIES[layer.strategy], *where)
        assert best.total_ms <= mine.total_ms
        assert mine.forward_ms > 0
        assert mine.backward_ms > mine.forward_ms
        assert mine.workspace_bytes > 0
        assert 0 < mine.forward.exposed_s < mine.forward.communication_s


def test_a_plan_takes_time_and_memory_from_the_strategy() -> None:
    layer = _plan(strategies=TABLE).layers[0]
    assert layer.strategy == "free"
    assert layer.reason.startswith("fastest of 5; next ")
    assert layer.forward_ms < 1e-3
    assert layer.backward_ms < 1e-3


def test_a_strategy_is_forced_by_name_and_by_layer() -> None:
    options = {"strategies": ringfx.STRATEGIES | {"all_gather_halves": HALVES}}
    assert _plan(**options, strategy="all_gather_halves").layers[0].strategy == HALVES.name
    assert _plan(**options, strategy={"*": "all_gather_halves"}).layers[0].strategy == HALVES.name
    with pytest.raises(InvalidArgument, match="unknown strategy 'all_gather_halves'"):
        _plan(strategy="all_gather_halves")


def test_what_it_does_not_admit_is_refused_with_its_reason() -> None:
    refusing = dataclasses.replace(
        FREE, admits=lambda site, p: Refusal(reason=f"{p} ranks are too few", remedy="use 3")
    )
    table = {"free": refusing}
    with pytest.raises(StrategyRefused, match='"free" cannot run here: 2 ranks are too few'):
        _plan(strategies=table, strategy="free")


def test_a_strategy_that_nobody_measured_has_the_largest_overhead() -> None:
    site = causal_site(tokens=256, dtype="float32", device="cpu", heads=2, kv_heads=2)
    largest = max(r.layer_us for r in EPYC.overheads if r.direction == "forward")
    assert predict(site, FREE, 2, EPYC).forward_ms == pytest.approx(largest / 1e3, rel=0.01)
    layer = _plan(strategies=TABLE).layers[0]
    assert unmeasured([layer], EPYC) == (
        "profile amd-epyc-2-ranks has no overhead of free: that of its most expensive strategy "
        "stands in",
    )
    assert unmeasured([layer], shipped("cpu-default")) == ()


# --- keys -----------------------------------------------------------------------------------------


def test_programs_tell_strategies_of_one_name_apart() -> None:
    other = dataclasses.replace(FREE, all_keys=False)
    assert key_of(FREE) == key_of(dataclasses.replace(FREE)) != key_of(other)
    assert strategy_of(key_of(FREE), "") == FREE
    assert strategy_of(key_of(other), "") == other
    assert [key_of(x) for x in ringfx.STRATEGIES.values()] == [*ringfx.STRATEGIES]
    mine = dataclasses.replace(FREE, name="production")
    assert key_of(mine) != "production"
    assert strategy_of(key_of(mine), "") == mine


# --- saved plans ----------------------------------------------------------------------------------


def test_a_saved_plan_asks_for_its_strategies_again() -> None:
    saved = ringfx.Plan.from_json(_plan(strategies=TABLE).to_json())
    require_strategies(saved, TABLE, "plan.json")
    with pytest.raises(InvalidArgument) as caught:
        require_strategies(saved, ringfx.STRATEGIES, "plan.json")
    assert str(caught.value) == (
        "plan.json: layers[0] has the strategy 'free', and given are simple, "
        "collective, production, ulysses. Do: a plan holds the names of strategies, so give one "
        'of your own again, as strategies=ringfx.STRATEGIES | {"free": ...}.'
    )


def test_a_saved_plan_whose_strategy_cannot_run_is_damaged() -> None:
    plan = _plan()
    site = dataclasses.replace(plan.layers[0].site, heads=3, kv_heads=3)
    layer = dataclasses.replace(plan.layers[0], strategy="ulysses", site=site)
    changed = dataclasses.replace(plan, layers=(layer,))
    with pytest.raises(InvalidArgument, match=r"damaged: layers\[0\]: strategy 'ulysses' cannot"):
        require_strategies(changed, ringfx.STRATEGIES, "plan.json")


def test_the_command_line_takes_tables(tmp_path: Path) -> None:
    def run(*words: str) -> Any:
        return CliRunner().invoke(app, ["plan", *words])

    made = ["tests.strategies.test_given:made", "--seq-len", "128", "--world-size", "2"]
    table = ["--strategies", "tests.strategies.test_given:TABLE"]
    planned = run(*made, *table, "--profile", "cpu-default", "--json")
    assert planned.exit_code == 0, planned.output
    assert ringfx.Plan.from_json(planned.stdout).layers[0].strategy == "free"
    saved = tmp_path / "plan.json"
    saved.write_text(planned.stdout)
    assert run(str(saved), *table, "--what-if", "world-size=4").exit_code == 0
    missing = run(str(saved))
    assert missing.exit_code == 2
    assert "has the strategy 'free', and given are simple, collective" in missing.stderr
    unknown = run(*made, "--strategies", "tests.strategies.test_given:TABEL")
    assert "has no attribute 'TABEL'. Did you mean 'TABLE'?" in unknown.stderr
    ruled = ["tests.strategies.test_given:ruled", "--seq-len", "128", "--world-size", "2"]
    assert "has no rule that says how to split it" in run(*ruled).stderr
    assert run(*ruled, "--rules", "examples.own_rule:RULES").exit_code == 0


def made(seq_len: int) -> Any:
    return own_strategy.Attention(64, 4, 4), (torch.zeros(1, seq_len, 64),)


def ruled(seq_len: int) -> Any:
    return own_rule.Model(), (torch.zeros(1, seq_len, 32),)


# --- rules ----------------------------------------------------------------------------------------


def _ruled_plan(**options: Any) -> ringfx.Plan:
    with torch.device("meta"):
        model, x = own_rule.Model(), torch.zeros(1, 128, 32)
    return ringfx.plan(model, (x,), world_size=2, profile="cpu-default", **options)


def test_a_rule_makes_an_operator_split_that_is_an_error_without_it() -> None:
    with pytest.raises(NoAxisRule, match=r"or give a rule for it, rules=ringfx\.RULES \| "):
        _ruled_plan()
    gathered = _ruled_plan(on_unsupported="gather")
    assert any("gather" in move.kind for move in gathered.collectives)
    plan = _ruled_plan(rules=own_rule.RULES)
    assert not any("gather" in move.kind for move in plan.collectives)
    assert "examples.swish.default: split by a rule that was given" in texts_of(plan.notes)


def test_a_rule_that_no_call_reads_is_named() -> None:
    unread = {torch.ops.aten.erfinv.default: axes(self="b s c", out="b s c")}
    plan = _ruled_plan(rules=own_rule.RULES | unread)
    told = "aten.erfinv.default: a rule was given, but the captured program has no call of it"
    assert told in texts_of(plan.notes)


# --- bad values -----------------------------------------------------------------------------------


SWISH = torch.ops.examples.swish


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategies": ["free"]}, "strategies is a list. Do: give a mapping, ringfx."),
        ({"strategies": {}}, "strategies is empty. Do: give a mapping"),
        ({"strategies": {"free": _free}}, "strategies['free'] is a function, not a ringfx.Strat"),
        ({"strategies": {"mine": FREE}}, "strategies['mine'] is named 'free'. Do: give it under"),
        (
            {"strategies": {"auto": dataclasses.replace(FREE, name="auto")}},
            "no strategy can be named 'auto'. Do: use letters, digits and _, and none of auto, ",
        ),
        (
            {"strategies": {"free": dataclasses.replace(FREE, time=3)}},
            "strategies['free'].time is a int. Do: give a function",
        ),
        ({"rules": [SWISH]}, "rules is a list. Do: give a mapping, ringfx.RULES | "),
        (
            {"rules": {SWISH: own_rule.RULES[SWISH.default]}},
            "rules: examples.swish has overloads, and each has a row of its own. Do: use "
            "examples.swish.default.",
        ),
        (
            {"rules": {SWISH.default: "b s"}},
            "rules[examples.swish.default] is a str, no function. Do",
        ),
        (
            {"rules": {3: own_rule.RULES[SWISH.default]}},
            "rules: the key 3 is no operator.",
        ),
    ],
)
def test_what_is_no_table_is_refused_at_once(options: dict[str, Any], message: str) -> None:
    for ask in (Settings.of, lambda given: ringfx.optimize(torch.nn.Linear(2, 2), **given)):
        with pytest.raises(InvalidArgument) as caught:
            ask(options)
        assert message in str(caught.value)
