"""A transformer in plain torch: SDPA with is_causal, learned positions, a loss written by hand."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

import ringfx
from tests.end_to_end.models import plain, shifted_loss, tokens, tokens_and_labels
from tests.support.harness import Case, RankPool, compare_all

STRATEGIES = ("simple", "collective", "production", "auto")


def first(output: Any) -> torch.Tensor:
    result: torch.Tensor = output[0]
    return result


def loss_outside(seq_len: int, logits: torch.Tensor) -> torch.Tensor:
    return shifted_loss(logits, tokens(seq_len, 2))


def mean_square(output: torch.Tensor) -> torch.Tensor:
    return output.square().mean()


def only_tokens(seq_len: int) -> dict[str, torch.Tensor]:
    return {"input_ids": tokens(seq_len, 2)}


def positional_tokens(seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = tokens(seq_len, 2)
    return drawn, drawn


def cases(seq_len: int, **more: Any) -> list[Case]:
    fields: dict[str, Any] = {"model": plain(), "loss": first} | more
    inputs = fields.pop("inputs", tokens_and_labels(seq_len, 2))
    return [
        Case(
            inputs=inputs,
            options={"strategy": strategy, "compiler": "eager"},
            label=f"S={seq_len}, {strategy}",
            **fields,
        )
        for strategy in STRATEGIES
    ]


def check(pool: RankPool, some: list[Case]) -> None:
    for found in compare_all(pool, some):
        found.check()
        assert len(found.strategies) == 2, found.ranks[0].plan


@pytest.mark.parametrize("seq_len", [48, 61])
def test_the_shift_written_by_slices_crosses_shard_boundaries(
    ranks3: RankPool, seq_len: int
) -> None:
    check(ranks3, cases(seq_len))


def test_in_float64_to_1e_10(ranks2: RankPool, ranks3: RankPool) -> None:
    check(ranks2, cases(61, dtype=torch.float64))
    check(ranks3, cases(61, dtype=torch.float64))


def test_a_loss_computed_outside_the_model(ranks2: RankPool) -> None:
    outside = functools.partial(loss_outside, 61)
    inputs = functools.partial(only_tokens, 61)
    check(ranks2, cases(61, inputs=inputs, loss=outside))


def test_attention_without_a_mask(ranks3: RankPool) -> None:
    inputs = functools.partial(only_tokens, 61)
    check(ranks3, cases(61, model=plain(causal=False), inputs=inputs, loss=mean_square))


def test_positional_arguments(ranks2: RankPool) -> None:
    check(ranks2, cases(48, inputs=functools.partial(positional_tokens, 48)))


class BiasedWithoutGradient(nn.Module):
    """A bias from a trained table that is read without gradient, as in LayoutLMv3."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.table = nn.Parameter(torch.randn(8, 2))
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, 2, 4).permute(2, 0, 3, 1, 4)
        places = torch.arange(length)
        distance = (places[:, None] - places).abs().clamp(max=7)
        with torch.no_grad():
            bias = self.table[distance].permute(2, 0, 1)[None]
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return y.transpose(1, 2).reshape(batch, length, 8)


def test_a_bias_read_without_gradient_gives_its_table_none() -> None:
    model = BiasedWithoutGradient()
    x = torch.randn(2, 11, 8)
    expected = model(x)
    found = ringfx.optimize(model, compiler="eager")(x)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    assert model.table.grad is None
    assert model.qkv.weight.grad is not None
