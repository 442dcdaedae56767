"""A rule that is broken on purpose is noticed: by verification, or by a wrong number."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

from ringfx.compile.pipeline import Lowered
from ringfx.errors import VerificationError
from ringfx.ir.values import Sites
from ringfx.passes.axes import propagate
from ringfx.passes.axes.call import AxisRule, AxisRules, Call, OpAxes
from ringfx.passes.axes.how import Sum
from ringfx.passes.axes.rules import find_rule
from ringfx.passes.verify import verify
from tests.end_to_end.test_generality import case
from tests.models import shapes
from tests.support.harness import RankDifference, RankPool, compare_here
from tests.support.programs import lowered

aten = torch.ops.aten


def ids() -> torch.Tensor:
    return torch.zeros(2, 11, dtype=torch.int64)


def broken(op: object, change: Callable[[OpAxes], OpAxes]) -> Any:
    """The axis table with one row changed."""

    def find(target: object, rules: AxisRules) -> AxisRule | None:
        rule = find_rule(target, rules)
        if target is not op:
            return rule
        assert rule is not None

        def changed(call: Call) -> OpAxes:
            return change(rule(call))

        return changed

    return mock.patch.object(propagate, "find_rule", find)


def all_local(axes: OpAxes) -> OpAxes:
    return dataclasses.replace(axes, share={}, how=None, windows=())


def no_sizes(axes: OpAxes) -> OpAxes:
    return dataclasses.replace(axes, how=None)


def unfilled(axes: OpAxes) -> OpAxes:
    assert isinstance(axes.how, Sum)
    return dataclasses.replace(axes, how=dataclasses.replace(axes.how, fill={}))


def not_mean(axes: OpAxes) -> OpAxes:
    assert isinstance(axes.how, Sum)
    return dataclasses.replace(axes, how=dataclasses.replace(axes.how, mean=False))


class Expanded(shapes.Base):
    def forward(self, given: torch.Tensor) -> torch.Tensor:
        x = self.first(self.embed(given), is_causal=True)
        gate = x.mean(-1, keepdim=True).expand(2, 11, shapes.HIDDEN)
        result: torch.Tensor = self.second(x * gate, is_causal=True)
        return result


def test_sizes_that_stay_global_are_noticed() -> None:
    lowered(Expanded(), ids())
    with broken(aten.expand.default, no_sizes), pytest.raises((VerificationError, RuntimeError)):
        lowered(Expanded(), ids())


def rebuilt(program: Lowered, **sites: Any) -> None:
    found = tuple(layer.site for layer in program.plan.layers)
    verify(program.captured, Sites(**{"found": found} | sites), program.local)


def test_a_lost_attention_is_noticed() -> None:
    program = lowered(shapes.Causal(), ids())
    rebuilt(program)
    site = program.plan.layers[0].site
    with pytest.raises(VerificationError, match="3 attention sites were found and 2 rewritten"):
        rebuilt(program, found=(site, site, site))


def test_a_value_of_the_wrong_shape_is_noticed_with_its_place() -> None:
    program = lowered(shapes.Causal(), ids())
    graph = program.captured.graph_module.graph
    norm = next(n for n in graph.nodes if n.target is aten.layer_norm.default)
    norm.meta["val"] = norm.meta["val"].to(torch.float64)
    with pytest.raises(VerificationError, match=r"first\.norm \(shapes\.py:\d+\).*layer_norm"):
        rebuilt(program)


class Along(shapes.Base):
    """One operator along the tokens, between two attentions."""

    def __init__(self, operator: str) -> None:
        super().__init__()
        self.operator = operator

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        x = self.first(self.embed(given), is_causal=True)
        result: torch.Tensor = self.second(x + ALONG[self.operator](x), is_causal=True)
        return result


ALONG: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "scan": lambda x: x.cumsum(1),
    "reversal": lambda x: x.flip(1),
    "softmax": lambda x: x.softmax(1),
    "mean": lambda x: x.mean(1, keepdim=True),
    "sum": lambda x: x.sum(1, keepdim=True),
}
BREAKS: dict[str, tuple[str, object, Callable[[OpAxes], OpAxes]]] = {
    "a scan that claims to be local": ("scan", aten.cumsum.default, all_local),
    "a reversal that claims to be local": ("reversal", aten.flip.default, all_local),
    "a softmax that claims to be local": ("softmax", aten.softmax.int, all_local),
    "a mean of the parts' own means": ("mean", aten.mean.dim, not_mean),
    "a mean over padding": ("mean", aten.mean.dim, unfilled),
    "a sum over padding": ("sum", aten.sum.dim_IntList, unfilled),
}


def difference(name: str, *, intact: bool = False) -> RankDifference:
    operator, op, change = BREAKS[name]
    one = dataclasses.replace(
        case("one causal model"), model=functools.partial(Along, operator), label=name
    )
    with broken(op, (lambda axes: axes) if intact else change):
        (found,) = compare_here(one).ranks
    return found


def differences(names: list[str]) -> dict[str, RankDifference | str]:
    found: dict[str, RankDifference | str] = {}
    for name in names:
        try:
            found[name] = difference(name)
            found[f"{name}, mended"] = difference(name, intact=True)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


@pytest.fixture(scope="module")
def found(ranks2: RankPool) -> dict[str, RankDifference | str]:
    results: dict[str, RankDifference | str] = ranks2.run(differences, list(BREAKS))[0]
    return results


@pytest.mark.ranks
@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_row_gives_wrong_numbers_that_a_comparison_sees(
    found: dict[str, RankDifference | str], name: str
) -> None:
    result = found[name]
    mended = found[f"{name}, mended"]
    assert isinstance(result, RankDifference), result
    assert isinstance(mended, RankDifference), mended
    assert worst(result) > 1e-6, result
    assert worst(mended) < 1e-10, mended


def worst(result: RankDifference) -> float:
    return max(result.loss, result.worst_output[1], result.worst_gradient[1])
