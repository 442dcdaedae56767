"""What runs whole on every rank is planned, warned of and refused as such."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ringfx
from ringfx.cost_model import load_profile
from ringfx.cost_model.choice.whatif import Change, replan
from ringfx.errors import AttentionReplicated
from ringfx.ir.plan import Plan
from ringfx.report.plan_html import to_html
from tests.support.harness import RankPool

SHAPE = (1, 6, 5, 16)


class Axial(nn.Module):
    """Attention along rows, then along columns: no split fits both."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.cols = (
            nn.MultiheadAttention(16, 2, batch_first=True, dropout=0.0) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        b, r, c, d = x.shape
        y = x.reshape(b * r, c, d)
        x = (y + self.rows(y, y, y, need_weights=False)[0]).view(b, r, c, d).transpose(1, 2)
        y = x.reshape(b * c, r, d)
        return (y + self.cols(y, y, y, need_weights=False)[0]).view(b, c, r, d).transpose(1, 2)


class OneQuery(nn.Module):
    """A layer over all tokens, and a pooling one whose only query is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.one = nn.Linear(16, 48), nn.Parameter(torch.randn(1, 2, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v)
        return F.scaled_dot_product_attention(self.one, y, y)


def plan_of(model: nn.Module, *shape: int, world_size: int = 3, strict: bool = False) -> Plan:
    return ringfx.plan(model, (torch.randn(*shape),), world_size=world_size, strict=strict)


@pytest.fixture(scope="module")
def axial() -> Plan:
    return plan_of(Axial(), *SHAPE)


def test_attention_along_two_axes_is_planned_as_whole_with_the_reason(axial: Plan) -> None:
    assert [x.strategy for x in axial.layers] == ["replicated"] * 2
    assert "two token axes, 6 (dimension 0) and 5 (dimension 2)" in axial.layers[0].reason
    assert not axial.is_split
    assert not axial.split_layers
    assert axial.axes == ()
    assert axial.memory.split_bytes == 0


def test_its_time_and_memory_are_those_of_one_rank(axial: Plan) -> None:
    alone = plan_of(Axial(), *SHAPE, world_size=1)
    assert axial.total_ms == alone.total_ms
    assert axial.memory.peak_bytes == alone.memory.peak_bytes


def test_every_view_of_the_plan_says_so(axial: Plan) -> None:
    assert "NOTHING IS SPLIT: each of the 3 ranks" in str(axial)
    assert "2/2 found, 2 replicated (every rank computes all of it)" in str(axial)
    assert "NOTHING IS SPLIT" in to_html(axial)
    assert Plan.from_json(axial.to_json()) == axial


def test_a_changed_plan_keeps_what_is_whole(axial: Plan) -> None:
    profile = load_profile(axial.profile, device=axial.device)
    changed = replan(axial, Change(world_size=6), profile)
    assert [x.strategy for x in changed.layers] == ["replicated"] * 2
    assert changed.layers[0].reason == axial.layers[0].reason
    assert changed.memory.peak_bytes == axial.memory.peak_bytes


def test_strict_mode_refuses_it_with_the_reason() -> None:
    with pytest.raises(AttentionReplicated, match=r"2 of 2 attentions cannot be split(.|\n)*rows"):
        plan_of(Axial(), *SHAPE, strict=True)


def test_a_layer_that_is_whole_beside_one_that_is_split_is_told_apart() -> None:
    plan = plan_of(OneQuery(), 1, 40, 16)
    split, whole = plan.layers
    assert (split.axis, whole.axis) == ("tokens", "")
    assert whole.is_replicated
    assert plan.split_layers == (split,)
    assert plan.is_split
    assert not plan.unsplit_words
    other = dataclasses.replace(plan, layers=(split, dataclasses.replace(whole, axis="tokens")))
    assert other.digest() != plan.digest()


def run_axial() -> list[str]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ringfx").addHandler(handler)
    torch.manual_seed(0)
    model = Axial()
    optimized = ringfx.optimize(model, compiler="eager")
    for _ in range(2):
        optimized(torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)))
    return said


@pytest.mark.ranks
def test_a_run_warns_once(ranks2: RankPool) -> None:
    for said in ranks2.run(run_axial):
        assert sum("NOTHING IS SPLIT" in text for text in said) == 1
        assert sum("is replicated on every rank, not split: its queries" in t for t in said) == 2
