"""The harness must go red when a model is wrong, and survive ranks that fail."""

from __future__ import annotations

import math
import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.support.harness import Case, RankError, RankPool, compare, compare_here, raises

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


def sum_of_ranks(offset: int) -> tuple[int, int]:
    total = torch.tensor(dist.get_rank() + offset)
    dist.all_reduce(total)
    return dist.get_rank(), int(total)


def fails_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("seventeen")


def dies_on_rank_1() -> None:
    if dist.get_rank() == 1:
        os._exit(3)


def sleeps_on_rank_1() -> None:
    if dist.get_rank() == 1:
        time.sleep(60)


def leaves_a_trace() -> int:
    dist.new_group([0])  # the next call must not see it
    return len(dist.distributed_c10d._world.pg_map)


def test_a_pool_is_reused_and_returns_results_by_rank(ranks3: RankPool) -> None:
    assert ranks3.run(sum_of_ranks, 1) == [(0, 6), (1, 6), (2, 6)]
    assert ranks3.run(sum_of_ranks, offset=0) == [(0, 3), (1, 3), (2, 3)]


def test_each_call_has_a_process_group_of_its_own(ranks2: RankPool) -> None:
    assert ranks2.run(leaves_a_trace) == ranks2.run(leaves_a_trace) == [2, 1]


def test_failures_name_the_rank_and_the_pool_recovers() -> None:
    pool = RankPool(2, collective_timeout_s=20)
    try:
        with pytest.raises(RankError, match=r"rank 1 of 2: (.|\n)*ValueError: seventeen"):
            pool.run(fails_on_rank_1)
        with pytest.raises(RankError, match="rank 1 of 2: the process died, exit code 3"):
            pool.run(dies_on_rank_1)
        pool.run(sum_of_ranks, 0)  # started again: the limit below is not spent on that
        with pytest.raises(RankError, match=r"rank 1 of 2 did not answer (.|\n)*sleeps_on_rank_1"):
            pool.run(sleeps_on_rank_1, timeout_s=5)
        assert pool.run(sum_of_ranks, 0) == [(0, 1), (1, 1)]
    finally:
        pool.close()


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
