"""Two ranks for the sequence, two for the data: gradients of the mean over the whole batch."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import ringfx
from tests.end_to_end.models import plain, tokens
from tests.support.harness import RankPool, gradient_differences

pytestmark = pytest.mark.ranks

STEPS = 3


def combined(source: nn.Module, order: str, compiler: Any, mesh: Any) -> nn.Module:
    # Small buckets: with them torch.compile would cut the graph into many.
    parallel = functools.partial(
        DistributedDataParallel, process_group=mesh["dp"].get_group(), bucket_cap_mb=0.01
    )
    optimize = functools.partial(ringfx.optimize, compiler=compiler)
    if order == "outside":
        return parallel(optimize(source, mesh=mesh["sp"]))
    return optimize(parallel(source), mesh=mesh["sp"].get_group())


def trained(order: str, compiler: str, accumulate: bool) -> tuple[list[float], int]:
    """Differences of gradients at each step from one process on the whole batch; layers split."""
    torch._dynamo.reset()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    stock = plain()().double()
    source = copy.deepcopy(stock)
    model: Any = combined(source, order, compiler, mesh)
    replica = mesh["dp"].get_local_rank()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (stock, source)]
    found = []
    for step in range(STEPS):
        batch = [[tokens(29, 2, seed=100 * step + 10 * n + r) for r in range(2)] for n in range(2)]
        batch = batch if accumulate else batch[:1]
        for optimizer in optimizers:
            optimizer.zero_grad()
        for parts in batch:
            sum(stock(part, part)[0] / 2 for part in parts).backward()
        for parts in batch[:-1]:
            with model.no_sync():
                model(parts[replica], parts[replica])[0].backward()
        model(batch[-1][replica], batch[-1][replica])[0].backward()
        ours, expected = ({n: p.grad for n, p in m.named_parameters()} for m in (source, stock))
        found.append(max(gradient_differences(ours, expected).values()))
        for optimizer in optimizers:
            optimizer.step()
    optimized = model if order == "inside" else model.module
    return found, len(optimized.plan.layers)


@pytest.mark.parametrize(
    ("order", "compiler", "accumulate"),
    [
        pytest.param("outside", "eager", False, marks=pytest.mark.slow),
        ("inside", "eager", False),
        ("outside", "aot_eager", True),
        pytest.param("inside", "eager", True, marks=pytest.mark.slow),
    ],
)
def test_gradients_are_those_of_the_mean_over_the_whole_batch(
    ranks4: RankPool, order: str, compiler: str, accumulate: bool
) -> None:
    for found, num_layers in ranks4.run(trained, order, compiler, accumulate):
        assert max(found) < 1e-12, found
        assert num_layers == 2
