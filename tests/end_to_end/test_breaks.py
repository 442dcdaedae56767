"""Code that Dynamo cannot compile between attentions: results and gradients stay, on two ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import ringfx
from tests.end_to_end.models import tokens
from tests.harness import Case, RankPool, compare_all
from tests.passes.models import VOCAB, Causal

pytestmark = pytest.mark.ranks


class Reading(Causal):
    """Reads a value in its loop over blocks: Dynamo skips the frame and compiles the callees."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in (self.first, self.second):
            x = block(x, is_causal=True)
            if float(x.detach().abs().max()) > 1e9:
                x = x.clamp(-1e9, 1e9)
        logits: torch.Tensor = self.head(x)
        return logits


class Recurrent(nn.Module):
    """Attention after a callee that has none, in a frame that is skipped."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Embedding(VOCAB, 24), nn.LayerNorm(24))
        self.body = Causal()
        self.body.embed = nn.Identity()  # type: ignore[assignment]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for _ in range(2):
            if float(x.detach().mean()) > 1e9:
                x = -x
        logits: torch.Tensor = self.body(x)
        return logits


def inputs() -> tuple[torch.Tensor, ...]:
    return (tokens(11, 2, vocab=VOCAB),)


def square(output: torch.Tensor) -> torch.Tensor:
    return output.square().mean()


def case(model: Any) -> Case:
    return Case(
        model=model, inputs=inputs, loss=square, dtype=torch.float64, label=model.__name__,
        options={"compiler": "eager"},
    )  # fmt: skip


def test_gradients_cross_programs_that_uncompiled_code_joins(ranks2: RankPool) -> None:
    for comparison in compare_all(ranks2, [case(Reading), case(Recurrent)]):
        comparison.check()
        assert len(comparison.strategies) == 2


def test_a_plan_says_where_it_stopped() -> None:
    plan = ringfx.plan(Reading(), inputs(), world_size=2)
    assert len(plan.layers) == 1
    assert any("in forward, which runs uncompiled" in note for note in plan.notes), plan.notes
    assert any("planning stopped where the model's own code reads" in note for note in plan.notes)
