"""The layer, and models that contain it, split by ringfx.optimize."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import nn

import ringfx
from examples.longnet import PATCH, LongNet
from ringfx.errors import InvalidArgument
from ringfx.nn import DilatedAttention
from tests.support.ranks import RankPool


class Encoder(nn.Module):
    """Two layers, a norm before each, and the mean of all tokens."""

    def __init__(self, *, causal: bool = False, kv_heads: int | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            DilatedAttention(24, 6, [8, 20, 40], [1, 2, 3], causal=causal, num_kv_heads=kv_heads)
            for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(self.norm(x))
        scores: torch.Tensor = self.head(x.mean(1))
        return scores


def step(
    model: nn.Module, x: torch.Tensor, owner: nn.Module
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    out = model(x)
    out.square().sum().backward()
    return out.detach(), {n: p.grad for n, p in owner.named_parameters() if p.grad is not None}


def largest_difference(length: int, **given: Any) -> tuple[float, str]:
    """Of the output and all gradients, relative; and how the plan calls the mask."""
    torch.manual_seed(0)
    stock = Encoder(**given).double()
    x = torch.randn(2, length, 24, dtype=torch.float64)
    model = copy.deepcopy(stock)
    optimized = ringfx.optimize(model, compiler="aot_eager")
    out, gradients = step(optimized, x, model)
    expected, exact = step(stock, x, stock)
    assert gradients.keys() == exact.keys()
    largest = max(float(g.abs().max()) for g in exact.values())
    worst = max(float((gradients[n] - g).abs().max()) / largest for n, g in exact.items())
    words = {layer.mask for layer in optimized.plan.layers}
    return max(worst, float((out - expected).abs().max())), ", ".join(words)


def test_a_model_is_split_with_equal_results(ranks2: RankPool) -> None:
    for difference, words in ranks2.run(largest_difference, 53, kv_heads=2):
        assert difference < 1e-12
        assert words == "dilated, segments 8 / 20 / 40, rates 1 / 2 / 3"


def test_a_causal_model_on_three_ranks(ranks3: RankPool) -> None:
    for difference, words in ranks3.run(largest_difference, 61, causal=True):
        assert difference < 1e-12
        assert words.endswith(", causal")


def longnet() -> tuple[dict[str, float], str]:
    """How far the example's loss and gradients are from the unsplit model's, and its mask."""
    torch.manual_seed(0)
    stock = LongNet().double()
    model = copy.deepcopy(stock)
    optimized = ringfx.optimize(model, compiler="aot_eager")
    patches, label = torch.randn(1, 4_500, PATCH, dtype=torch.float64), torch.tensor([1])
    losses = [step(patches, label) for step in (stock, optimized)]
    for loss in losses:
        loss.backward()
    found = {"loss": float((losses[1] - losses[0]).abs())}
    for (name, ours), theirs in zip(model.named_parameters(), stock.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        found[name] = float((ours.grad - theirs.grad).abs().max())
    return found, optimized.plan.layers[0].mask


def test_the_longnet_of_the_examples_is_split_with_equal_results(ranks2: RankPool) -> None:
    for found, words in ranks2.run(longnet):
        assert max(found.values()) < 1e-12
        assert words == "dilated, segments 1,024 / 2,048 / 4,096, rates 1 / 2 / 4"


def test_the_layer_says_what_it_is_and_what_it_cannot_be() -> None:
    layer = DilatedAttention(32, 4, [8, 16], [1, 2], bias=False)
    assert "segment_lengths=[8, 16], dilation_rates=[1, 2]" in repr(layer)
    assert layer.q_proj.bias is None
    for given, named in (
        ((30, 4, [8], [1]), "embed_dim is 30, which 4 heads do not divide"),
        ((32, 4, [8], [1, 2]), "1 segment_lengths [8], 2 dilation_rates [1, 2]"),
        ((32, 0, [8], [1]), "num_heads is 0"),
    ):
        with pytest.raises(InvalidArgument, match=re.escape(named)):
            DilatedAttention(*given)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="num_heads is 4, which 3 heads"):
        DilatedAttention(32, 4, [8], [1], num_kv_heads=3)
    for shape in ((16, 32), (1, 16, 31)):
        with pytest.raises(InvalidArgument, match=r"Do: pass \[batch, tokens, 32\]"):
            DilatedAttention(32, 4, [8], [1])(torch.zeros(shape))
