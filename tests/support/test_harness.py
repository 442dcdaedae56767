"""The harness must go red when a model is wrong, and survive ranks that fail."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.support.harness import Case, RankPool, compare, compare_here, raises

pytestmark = pytest.mark.ranks


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.second(torch.tanh(self.first(x)))
        return result


def tiny_inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {"x": torch.randn(2, 3, 4, generator=generator, requires_grad=True)}


def square_loss(output: torch.Tensor) -> torch.Tensor:
    return output.pow(2).mean()


def unchanged(model: nn.Module) -> nn.Module:
    return model


def wrong_gradient_on_rank_1(model: Tiny) -> nn.Module:
    if dist.get_rank() == 1:
        model.first.weight.register_hook(lambda grad: grad * 1.01)  # type: ignore[no-untyped-call]
    return model


class OneGradientLost(nn.Module):
    def __init__(self, model: Tiny) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = nn.functional.linear(x, self.model.first.weight)
        result: torch.Tensor = self.model.second(torch.tanh(first + self.model.first.bias.detach()))
        return result


def fails_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("seventeen")


def test_expected_errors_are_collected_from_every_rank(ranks2: RankPool) -> None:
    assert (
        raises(ranks2, int, "x") == ["ValueError: invalid literal for int() with base 10: 'x'"] * 2
    )
    with pytest.raises(AssertionError, match=r"ranks \[0\] raised nothing"):
        raises(ranks2, fails_on_rank_1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_unchanged_model_has_no_difference(ranks2: RankPool, dtype: torch.dtype) -> None:
    found = compare(
        Tiny, tiny_inputs, pool=ranks2, dtype=dtype, loss_fn=square_loss, optimize=unchanged
    )
    assert found.check().gradient == 0.0
    assert set(found.ranks[1].gradients) == {
        "first.weight", "first.bias", "second.weight", "second.bias", "input['x']",
    }  # fmt: skip


def test_a_wrong_gradient_on_one_rank_is_found(ranks2: RankPool) -> None:
    found = compare(
        Tiny, tiny_inputs, pool=ranks2, loss_fn=square_loss, optimize=wrong_gradient_on_rank_1
    )
    assert found.ranks[0].worst_gradient[1] == 0.0
    name, value = found.ranks[1].worst_gradient
    assert name == "first.weight"
    assert value == pytest.approx(0.01, rel=1e-3)
    with pytest.raises(AssertionError, match=r"rank 1: .* gradients 1\.0e-02 \(first\.weight"):
        found.check()


def test_a_lost_gradient_is_infinitely_wrong() -> None:
    case = Case(model=Tiny, inputs=tiny_inputs, loss=square_loss, optimize=OneGradientLost)
    assert compare_here(case).ranks[0].worst_gradient == ("first.bias", math.inf)
