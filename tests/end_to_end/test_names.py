"""Programs are valid whatever their parts are called and however long they are."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

import ringfx
from tests.end_to_end.long_models import LONG, Conditions, Steps, phimoe, phimoe_inputs
from tests.end_to_end.long_models import states as few
from tests.end_to_end.named import WAYS, ByKeyword, Named, keywords, states
from tests.support.harness import Case, RankPool, compare_all
from tests.support.sampling import one_in


def mean_square(output: Any) -> torch.Tensor:
    """Of every result, no two of them alike."""
    if isinstance(output, torch.Tensor):
        return output.square().mean()
    values = list(output.values() if isinstance(output, dict) else output)
    return torch.stack([(1 + i) * y.square().mean() for i, y in enumerate(values)]).sum()


def case(model: Any, inputs: Any, label: str, **options: Any) -> Case:
    return Case(
        model=model, inputs=inputs, loss=mean_square, dtype=torch.float64,
        options={"strategy": "collective", "compiler": "eager"} | options, label=label,
    )  # fmt: skip


def test_names_that_code_cannot_say_change_nothing(ranks2: RankPool) -> None:
    chosen = {"strategy": {"*": "production", "inner.class attends": "collective"}}
    named = [case(partial(Named, way), states, way, **chosen) for way in one_in(3, WAYS)]
    *found, arguments = compare_all(ranks2, [*named, case(ByKeyword, keywords, "arguments")])
    for comparison in found:
        comparison.check()
        assert comparison.strategies == ("collective", "production", "production", "production")
    assert len(arguments.check().strategies) == 1


@pytest.mark.parametrize("way", WAYS)
def test_a_plan_names_modules_as_the_user_does(way: str) -> None:
    plan = ringfx.plan(Named(way), states(), world_size=2)
    assert [layer.name for layer in plan.layers] == [
        f"inner.{name} attends" for name in ("class", "a b", "é", "None")
    ]
    assert ringfx.Plan.from_json(plan.to_json()) == plan
    assert "inner.class attends" in " ".join(str(plan).split())


@pytest.mark.slow
@pytest.mark.parametrize("model", LONG)
def test_hundreds_in_a_row_are_planned(model: Any) -> None:
    assert len(ringfx.plan(model(), few(), world_size=2).layers) == 1


def test_masks_of_hundreds_of_operators_are_equal(ranks2: RankPool) -> None:
    cases = [case(model, few, model.__name__) for model in (Conditions, Steps)]
    for comparison in compare_all(ranks2, cases):
        assert len(comparison.check().strategies) == 1, comparison.label


@pytest.mark.parametrize("training", [True, False])
def test_a_mixture_of_experts_with_jittered_inputs_is_planned(training: bool) -> None:
    plan = ringfx.plan(phimoe().train(training), kwargs=phimoe_inputs(), world_size=2)
    assert len(plan.layers) == 2


def test_a_mixture_of_experts_with_jittered_inputs_is_equal_in_evaluation(ranks2: RankPool) -> None:
    options = {"compiler": "eager"}
    compare_all(ranks2, [Case(model=phimoe, inputs=phimoe_inputs, options=options)])[0].check()
