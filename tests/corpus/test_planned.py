"""A plan made offline is the plan of the run: layers, strategies, axes and messages."""

from __future__ import annotations

import pytest

from ringfx.plan import Plan
from tests.corpus.planned import difference, planned, ran
from tests.harness import RankPool

pytestmark = pytest.mark.ranks

NAMES = ("llama/sdpa", "openai_gpt/eager", "xlm/eager", "fsmt/eager")
"""One program; a mask in a buffer; an item() or a branch on values before the first attention."""


@pytest.fixture(scope="module")
def runs(ranks2: RankPool) -> list[dict[str, Plan | str]]:
    return ranks2.run(ran, list(NAMES))


@pytest.mark.parametrize("name", NAMES)
def test_the_plan_is_what_runs(runs: list[dict[str, Plan | str]], name: str) -> None:
    plan = planned(name)
    assert isinstance(plan, Plan), plan
    assert plan.layers
    for by_rank in runs:
        assert difference(plan, by_rank[name]) == ""
