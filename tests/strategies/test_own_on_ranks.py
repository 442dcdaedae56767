"""Strategies and rules of a user's own, run: equal to the unsplit model, and the right one."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch

import ringfx
from examples import own_rule, own_strategy
from examples.on_ranks import largest_difference
from ringfx.ir.note import texts_of
from ringfx.ir.values import CommKind
from ringfx.ops import gather, ring_attention, shard
from ringfx.strategies import Strategy, collective
from tests.support.ranks import RankPool

pytestmark = pytest.mark.ranks

HALVES = own_strategy.ALL_GATHER_HALVES


def test_the_example_of_a_strategy_equals_the_unsplit_model(ranks2: RankPool) -> None:
    for difference, plan in ranks2.run(own_strategy.compared):
        assert difference < 1e-9
        assert [layer.strategy for layer in plan.layers] == ["all_gather_halves"]
        assert "all_gather_halves" in str(plan)


def test_the_example_of_a_rule_equals_the_unsplit_model(ranks2: RankPool) -> None:
    for difference, plan in ranks2.run(own_rule.compared):
        assert difference < 1e-9
        assert not any(move.kind is CommKind.ALL_GATHER for move in plan.collectives)
        assert "examples.swish.default: split by a rule that was given" in texts_of(plan.notes)


def _by_hand() -> float:
    """Over one K/V head: there are no halves."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, 41, 8, dtype=torch.float64) for h in (4, 1, 1))
    parts = [shard(x, 2, layout="zigzag") for x in (q, k, v)]
    out = ring_attention(
        *parts, causal=True, layout="zigzag", length=41, kv_length=41, strategy=HALVES
    )
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    return float((gather(out, 2, layout="zigzag", length=41) - expected).abs().max())


def test_a_strategy_is_called_by_hand_and_on_three_ranks(ranks3: RankPool) -> None:
    assert max(ranks3.run(_by_hand)) < 1e-12


RAN: list[str] = []


def _noting(name: str, direction: str, *args: Any) -> Any:
    RAN.append(f"{name} {direction}")
    return getattr(collective, direction)(*args)


def _mine(name: str) -> Strategy:
    parts: dict[str, Any] = {x: partial(_noting, name, x) for x in ("forward", "backward")}
    return dataclasses.replace(HALVES, name="mine", **parts)


def _two_of_one_name() -> tuple[list[str], float]:
    RAN.clear()
    torch.manual_seed(0)
    model, x = own_strategy.Attention(32, 4, 2).double(), torch.randn(2, 41, 32).double()
    split = {
        name: ringfx.optimize(
            model, strategies={"mine": _mine(name)}, strategy="mine", compiler="aot_eager"
        )
        for name in ("first", "second")
    }
    return RAN, max(largest_difference(model, split[n], x) for n in ("first", "second", "first"))


def test_of_two_strategies_of_one_name_each_program_runs_its_own(ranks2: RankPool) -> None:
    for ran, difference in ranks2.run(_two_of_one_name):
        assert difference < 1e-9
        each = [[f"{n} forward", f"{n} backward"] for n in ("first", "second", "first")]
        assert ran == [x for pair in each for x in pair]


def _as_backend() -> tuple[list[str], float]:
    RAN.clear()
    torch.manual_seed(0)
    model, x = own_rule.Model().double(), torch.randn(2, 41, 32).double()
    options = {
        "strategies": {"mine": _mine("mine")}, "rules": own_rule.RULES, "compiler": "aot_eager",
    }  # fmt: skip
    split = torch.compile(model, backend="ringfx", options=options)
    return RAN, largest_difference(model, split, x)


def test_the_backends_options_take_both(ranks2: RankPool) -> None:
    for ran, difference in ranks2.run(_as_backend):
        assert difference < 1e-9
        assert ran == ["mine forward", "mine backward"]
