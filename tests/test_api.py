"""What ``ringfx.optimize`` promises at one rank, whatever the model: lengths, plans, identity."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import ringfx

LENGTHS = range(4, 16)
"""More than Dynamo's own limit of recompilations (8), after which it runs a model as it is."""


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return y.transpose(1, 2).flatten(2)


def test_every_length_runs_its_own_plan_however_many_there_are() -> None:
    torch._dynamo.reset()
    stock = Attention()
    model: Any = ringfx.optimize(stock, compiler="eager")
    for length in (*LENGTHS, *LENGTHS):
        x = torch.randn(2, length, 16)
        torch.testing.assert_close(model(x), stock(x))
        assert [axis.length for axis in model.plan.axes] == [length]
        assert len(model.plan.layers) == 1


def test_the_model_keeps_its_class_names_and_parameters() -> None:
    stock = Attention()
    model = ringfx.optimize(stock, compiler="eager")
    assert isinstance(model, Attention)
    assert list(model.state_dict()) == list(stock.state_dict())
    assert model.qkv.weight is stock.qkv.weight


def test_a_plan_is_asked_for_before_the_first_call() -> None:
    model: Any = ringfx.optimize(Attention(), compiler="eager")
    with pytest.raises(ringfx.RingfxError, match="has not run yet"):
        _ = model.plan


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Attention(), Attention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(self.first(x))
        return y


def test_stats_count_what_each_layer_did_and_time_it_only_when_asked() -> None:
    torch._dynamo.reset()
    ringfx.ops.reset_stats()
    model = ringfx.optimize(TwoLayers(), compiler="eager")
    x = torch.randn(2, 32, 16)
    model(x).sum().backward()
    found = ringfx.stats(model)
    assert sorted(found) == ["first", "second"]
    counts = [(s.forwards, s.backwards, s.messages, s.retries) for s in found.values()]
    assert counts == [(1, 1, 0, 0)] * 2
    assert found["first"].compute_s == 0.0
    with ringfx.ops.timed():
        model(x)
    assert ringfx.stats(model)["first"].compute_s > 0.0
    with pytest.raises(ringfx.RingfxError, match=r"does not come from ringfx\.optimize"):
        ringfx.stats(TwoLayers())


def test_another_kernel_than_the_plan_counts_on_is_announced_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch._dynamo.reset()
    ringfx.ops.reset_stats()
    chosen = ringfx.ops.attention.__globals__["choose"]
    monkeypatch.setitem(
        ringfx.ops.attention.__globals__,
        "choose",
        lambda *where, soft_cap, math_only: chosen(*where, soft_cap=soft_cap, math_only=True),
    )
    model = ringfx.optimize(Attention(), compiler="eager")
    for _ in range(2):
        model(torch.randn(2, 32, 16))
    said = [r.getMessage() for r in caplog.records if "kernel" in r.getMessage()]
    assert len(said) == 1
    assert "the plan counts on the cpu_flash kernel, and math ran" in said[0]
