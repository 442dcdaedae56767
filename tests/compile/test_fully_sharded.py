"""fully_shard before and after optimize; tensor parallelism over the same ranks is refused."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import fully_shard

import ringfx
from tests.end_to_end.models import llama, plain, tokens
from tests.support.harness import RankPool, gradient_differences, raises

pytestmark = pytest.mark.ranks

LENGTH = 13
optimize = functools.partial(ringfx.optimize, compiler="eager")


def sharded(order: str) -> tuple[float, int, int]:
    torch._dynamo.reset()
    stock, x = plain()(), tokens(LENGTH)
    source: Any = copy.deepcopy(stock)
    model: Any = optimize(source) if order in ("after", "part") else source
    for block in model.blocks if order != "root" else ():
        fully_shard(block)
    fully_shard(model)
    model = model if order in ("after", "part") else optimize(model)
    for one in (model, stock):
        one(x, labels=x)[0].backward()
    model.set_requires_gradient_sync(True)  # it is still a model that fully_shard knows
    whole = {n: p.grad.full_tensor() for n, p in model.named_parameters()}
    expected = {n: p.grad for n, p in stock.named_parameters()}
    worst = max(gradient_differences(whole, expected).values())
    return worst, model.plan.world_size, len(model.plan.layers)


@pytest.mark.parametrize("order", ["before", "after", "root"])
def test_fully_shard_works_before_and_after(ranks2: RankPool, order: str) -> None:
    for worst, ranks, num_layers in ranks2.run(sharded, order):
        assert worst < 1e-4
        assert (ranks, num_layers) == (2, 2)


def a_sharded_part() -> float:
    """``fully_shard(model.model)`` of an optimized model: the whole sees that it is sharded."""
    stock, x = llama()(), tokens(LENGTH)
    model: Any = optimize(copy.deepcopy(stock))
    fully_shard(model.model)
    fully_shard(model)
    for one in (model, stock):
        one(input_ids=x, labels=x).loss.backward()
    whole = {n: p.grad.full_tensor() for n, p in model.named_parameters()}
    expected = {n: p.grad for n, p in stock.named_parameters()}
    return max(gradient_differences(whole, expected).values())


def test_a_part_of_an_optimized_model_may_be_sharded(ranks2: RankPool) -> None:
    assert max(ranks2.run(a_sharded_part)) < 1e-4


def tensor_parallel() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (2,))
    model: Any = plain()()
    parallelize_module(model.blocks[0].mlp, mesh, {"1": ColwiseParallel(), "3": RowwiseParallel()})
    optimize(model)(tokens(LENGTH))


def test_parallelize_module_over_the_sequences_ranks_is_refused(ranks2: RankPool) -> None:
    for text in raises(ranks2, tensor_parallel):
        assert text.startswith("InvalidArgument: blocks.0.mlp.1.weight (96, 48) is a DTensor")
        assert "mesh['cp'] to ringfx.optimize" in text
