"""What runs whole on every rank is planned, warned of and refused as such."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ringfx
from ringfx.cost_model import load_profile
from ringfx.cost_model.choice.whatif import Change, replan
from ringfx.errors import AttentionReplicated
from ringfx.ir.plan import Plan
from ringfx.passes import steps
from ringfx.report.plan_html import to_html
from tests.support.harness import RankPool
from tests.support.split_here import split_here

SHAPE = (6, 16)


class Pairs(nn.Module):
    """Attention along rows of all pairs of tokens, then along columns: both are the same tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.cols = (
            nn.MultiheadAttention(16, 2, batch_first=True, dropout=0.0) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = x[:, None] + x[None].tanh()
        y = (y + self.rows(y, y, y, need_weights=False)[0]).transpose(0, 1)
        return y + self.cols(y, y, y, need_weights=False)[0]


class OneQuery(nn.Module):
    """A layer over all tokens, and one of a single query whose keys are kept for the next step."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.one = nn.Linear(16, 48), nn.Parameter(torch.randn(1, 2, 1, 8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v)
        return F.scaled_dot_product_attention(self.one, y, y), y


def plan_of(model: nn.Module, *shape: int, world_size: int = 3, strict: bool = False) -> Plan:
    return ringfx.plan(model, (torch.randn(*shape),), world_size=world_size, strict=strict)


@contextlib.contextmanager
def unseparated() -> Iterator[None]:
    """Columns that keep the axis of the rows they meet: ``Pairs`` has two token axes at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "separate_columns", lambda graph, lines: False)
        yield


@pytest.fixture(scope="module")
def pairs() -> Plan:
    with unseparated():
        return plan_of(Pairs(), *SHAPE)


@pytest.mark.parametrize(("tokens", "ranks"), [(6, 3), (7, 2)])
def test_pairs_of_tokens_are_split_where_columns_get_an_axis_of_their_own(
    tokens: int, ranks: int
) -> None:
    found = split_here(Pairs(), (torch.randn(tokens, 16, dtype=torch.float64),), ranks)
    assert found.worst < 1e-10
    assert found.strategies == ["collective", "local"]
    assert found.gathered == []


def test_attention_along_two_axes_is_planned_as_whole_with_the_reason(pairs: Plan) -> None:
    assert [x.strategy for x in pairs.layers] == ["replicated"] * 2
    assert "two token axes, 6 (dimension 0) and 6 (dimension 2)" in pairs.layers[0].reason
    assert not pairs.is_split
    assert not pairs.split_layers
    assert pairs.axes == ()
    assert pairs.memory.split_bytes == 0


def test_its_time_and_memory_are_those_of_one_rank(pairs: Plan) -> None:
    alone = plan_of(Pairs(), *SHAPE, world_size=1)
    assert pairs.total_ms == alone.total_ms
    assert pairs.memory.peak_bytes == alone.memory.peak_bytes


def test_every_view_of_the_plan_says_so(pairs: Plan) -> None:
    assert "NOTHING IS SPLIT: each of the 3 ranks" in str(pairs)
    assert "2/2 found, 2 replicated (every rank computes all of it)" in str(pairs)
    assert "NOTHING IS SPLIT" in to_html(pairs)
    assert Plan.from_json(pairs.to_json()) == pairs


def test_a_changed_plan_keeps_what_is_whole(pairs: Plan) -> None:
    profile = load_profile(pairs.profile, device=pairs.device)
    changed = replan(pairs, Change(world_size=6), profile)
    assert [x.strategy for x in changed.layers] == ["replicated"] * 2
    assert changed.layers[0].reason == pairs.layers[0].reason
    assert changed.memory.peak_bytes == pairs.memory.peak_bytes


def test_strict_mode_refuses_it_with_the_reason() -> None:
    with (
        unseparated(),
        pytest.raises(AttentionReplicated, match=r"2 of 2 attentions cannot be split(.|\n)*rows"),
    ):
        plan_of(Pairs(), *SHAPE, strict=True)


def test_a_layer_that_is_whole_beside_one_that_is_split_is_told_apart() -> None:
    plan = plan_of(OneQuery(), 1, 40, 16)
    split, pooled = plan.layers
    whole = dataclasses.replace(pooled, strategy="replicated", axis="")
    other = dataclasses.replace(plan, layers=(split, whole))
    assert whole.is_replicated
    assert other.split_layers == (split,)
    assert other.is_split
    assert other.digest() != plan.digest()


def run_pairs() -> list[str]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ringfx").addHandler(handler)
    torch.manual_seed(0)
    model = Pairs()
    optimized = ringfx.optimize(model, compiler="eager")
    with unseparated():
        for _ in range(2):
            optimized(torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)))
    return said


@pytest.mark.ranks
def test_a_run_warns_once(ranks2: RankPool) -> None:
    for said in ranks2.run(run_pairs):
        assert sum("NOTHING IS SPLIT" in text for text in said) == 1
        assert sum("is replicated on every rank, not split: its queries" in t for t in said) == 2
