"""How many groups of heads: as cost nothing, more where memory is short, or what is asked."""

from __future__ import annotations

import pytest

from ringfx.compile.settings import Settings
from ringfx.cost_model import choose
from ringfx.cost_model.prediction.predict import Prediction, predict
from ringfx.errors import InvalidArgument, OutOfMemory
from ringfx.strategies import STRATEGIES
from tests.cost_model.sites import causal_site, shipped

H100 = shipped("h100-sxm-published")
LONG = causal_site(tokens=2**18)


def costs(name: str, asked: int) -> Prediction:
    return predict(LONG, STRATEGIES[name].in_groups(asked), 4, H100)


@pytest.mark.parametrize("name", ["collective", "production", "ulysses"])
def test_more_groups_hold_less(name: str) -> None:
    held = [costs(name, asked).workspace_bytes for asked in (1, 2, 8)]
    assert held[0] > held[1] > held[2]


def test_more_ranks_than_bytes_are_counted() -> None:
    for name in ("collective", "production"):
        predict(LONG, STRATEGIES[name], 2**30, H100)


def test_simple_knows_no_groups() -> None:
    assert STRATEGIES["simple"].in_groups(4) is STRATEGIES["simple"]


def test_what_does_not_fit_by_itself_fits_in_more_groups() -> None:
    few, many = costs("ulysses", 0), costs("ulysses", 8)
    assert many.workspace_bytes < few.workspace_bytes
    budget = many.saved_bytes + (few.workspace_bytes + many.workspace_bytes) // 2
    (layer,) = choose([LONG], world_size=4, profile=H100, strategy="ulysses", gpu_memory=budget)
    assert layer.head_groups == 8
    assert layer.workspace_bytes == many.workspace_bytes
    assert "in up to 8 groups of heads, with" in layer.reason
    with pytest.raises(OutOfMemory):
        choose([LONG], world_size=4, profile=H100, strategy="ulysses", gpu_memory=budget // 2)


def test_where_it_fits_the_strategy_takes_its_own_number() -> None:
    for budget in (None, 10**15):
        (layer,) = choose([LONG], world_size=4, profile=H100, strategy="ulysses", gpu_memory=budget)
        assert layer.head_groups == 0
        assert "groups" not in layer.reason


@pytest.mark.parametrize("value", [0, 9, True, "many", 2.0])
def test_what_is_no_number_of_groups_is_refused(value: object) -> None:
    with pytest.raises(InvalidArgument, match="use auto, or a number of groups"):
        Settings.of({"head_groups": value})


def test_asked_of_all_strategies_that_know_groups() -> None:
    asked = Settings.of({"head_groups": 4}).strategies
    assert {name: s.head_groups for name, s in asked.items()} == {
        "simple": 0, "collective": 4, "production": 4, "ulysses": 4,
    }  # fmt: skip


def test_one_rank_has_no_use_for_groups() -> None:
    asked = Settings.of({"head_groups": 4}).strategies
    (layer,) = choose([LONG], world_size=1, profile=H100, strategies=asked)
    assert layer.reason == "one rank: the local kernel"
