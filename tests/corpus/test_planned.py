"""A plan made offline is the plan of the run: layers, strategies, axes and messages."""

from __future__ import annotations

import pytest

from ringfx.ir.plan import Plan
from tests.corpus.planned import difference, planned, ran
from tests.support.harness import RankPool

pytestmark = pytest.mark.ranks

NAMES = ("openai_gpt/eager", "fsmt/eager", "wav2vec2/sdpa")
"""One program with a mask in a buffer; an item(), and a branch on values, before the first
attention."""

MORE = (
    "llava/sdpa", "paligemma/eager", "llama/sdpa", "xlm/eager", "dbrx/sdpa", "led/eager",
    "hubert/sdpa", "data2vec_audio/sdpa", "data2vec_audio/eager", "unispeech_sat/sdpa",
    "wav2vec2-padded/sdpa", "dbrx/eager", "jetmoe/sdpa",
)  # fmt: skip


@pytest.mark.parametrize("name", [*NAMES, *(pytest.param(n, marks=pytest.mark.slow) for n in MORE)])
def test_the_plan_is_what_runs(ranks2: RankPool, name: str) -> None:
    runs = ranks2.run(ran, [name])
    plan = planned(name)
    assert isinstance(plan, Plan), plan
    assert plan.layers
    for by_rank in runs:
        assert difference(plan, by_rank[name]) == ""
