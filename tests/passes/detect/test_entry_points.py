"""Every form of calling attention by name: found, its mask read, outputs and gradients exact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.models.calls import CALLS, embedded
from tests.models.package_calls import PACKAGES, RAN
from tests.support.harness import Case, Comparison, RankDifference, RankPool, compare_here

pytestmark = pytest.mark.ranks

EVERY = {**CALLS, **PACKAGES}
FEW = list(EVERY)[::4]
OTHERS = [name for name in EVERY if name not in FEW]
ON_THREE = [name for i, name in enumerate(EVERY) if i % 5 == 2]


def weighted(output: torch.Tensor) -> torch.Tensor:
    """A loss in which every element counts differently."""
    weights = torch.arange(output.numel(), dtype=output.dtype).view(output.shape).cos()
    return (output * weights).square().sum() + output.mean()


def outcome(name: str) -> tuple[RankDifference, Any, list[str]] | str:
    import ringfx.api

    case = EVERY[name]
    plans: list[Any] = []

    def optimize(model: torch.nn.Module, **options: Any) -> torch.nn.Module:
        optimized = ringfx.optimize(model, **options)
        plans.append(optimized)
        return optimized

    RAN.clear()
    try:
        (found,) = compare_here(
            Case(
                model=case.model,
                inputs=embedded,
                dtype=torch.float64,
                options={"compiler": "eager"},
                loss=weighted,
                backward=case.backward,
                label=name,
                optimize=optimize,
            )
        ).ranks
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return found, plans[0].plan, list(RAN)


def outcomes(names: Sequence[str]) -> list[Any]:
    return [outcome(name) for name in names]


def check(name: str, by_rank: Sequence[Any]) -> None:
    case = EVERY[name]
    assert not [x for x in by_rank if isinstance(x, str)], by_rank
    ranks = tuple(found for found, _, _ in by_rank)
    Comparison(label=name, dtype=torch.float64, ranks=ranks).check()
    for _, plan, ran in by_rank:
        assert [layer.found_by for layer in plan.layers] == [case.found_by] * case.sites
        assert not case.mask or plan.layers[0].mask == case.mask
        assert len(ran) <= 1 + case.backward, f"the package ran in ringfx too: {ran}"


def by_name(ranks: RankPool, names: Sequence[str]) -> dict[str, Sequence[Any]]:
    """All in one call of the pool, since a call costs a new process group."""
    return dict(zip(names, zip(*ranks.run(outcomes, names), strict=True), strict=True))


@pytest.fixture(scope="module")
def few(ranks2: RankPool) -> dict[str, Sequence[Any]]:
    return by_name(ranks2, FEW)


@pytest.fixture(scope="module")
def others(ranks2: RankPool) -> dict[str, Sequence[Any]]:
    return by_name(ranks2, OTHERS)


@pytest.mark.parametrize("name", FEW)
def test_a_call_is_found_and_exact_on_two_ranks(few: dict[str, Sequence[Any]], name: str) -> None:
    check(name, few[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_any_other_call_is_found_and_exact_on_two_ranks(
    others: dict[str, Sequence[Any]], name: str
) -> None:
    check(name, others[name])


@pytest.mark.slow
def test_some_calls_on_three_ranks(ranks3: RankPool) -> None:
    for name, by_rank in zip(
        ON_THREE, zip(*ranks3.run(outcomes, ON_THREE), strict=True), strict=True
    ):
        check(name, by_rank)
