"""Tensor-parallel modules beside a split sequence, 2 x 2 ranks, against the unsplit model."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import ringfx
from tests.support.harness import RankPool, raises

pytestmark = pytest.mark.ranks

HIDDEN, VOCABULARY, HEAD = 16, 32, 4
Tensor = torch.Tensor


class Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(HIDDEN, HIDDEN) for _ in range(3))
        self.out = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, HEAD)).transpose(1, 2) for f in self.projected())
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y: Tensor = self.out(found.transpose(1, 2).flatten(2))
        return y

    def projected(self) -> tuple[nn.Module, ...]:
        return self.q, self.k, self.v


class Causal(nn.Module):
    """An embedding, one block and a head, all with biases."""

    def __init__(self, *, checkpoints: bool = False) -> None:
        super().__init__()
        self.checkpoints = checkpoints
        self.embed = nn.Embedding(VOCABULARY, HIDDEN, padding_idx=3)
        self.norm_a, self.norm_b = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.attend = Attend()
        self.mlp: nn.Module = nn.Sequential(
            nn.Linear(HIDDEN, 2 * HIDDEN), nn.GELU(), nn.Linear(2 * HIDDEN, HIDDEN)
        )
        self.head = nn.Linear(HIDDEN, VOCABULARY)

    def block(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm_a(x))
        y: Tensor = x + self.mlp(self.norm_b(x))
        return y

    def forward(self, numbers: Tensor) -> Tensor:
        x = self.embed(numbers)
        for block in (self.block,):  # where the graph breaks in a loop, all around it is uncompiled
            x = checkpoint(block, x, use_reentrant=False) if self.checkpoints else block(x)  # type: ignore[no-untyped-call]
        y: Tensor = self.head(x)
        return y


COLUMNS, ROWS = ColwiseParallel, RowwiseParallel
WHOLE = Replicate()
BLOCK = {
    "attend.q": COLUMNS(), "attend.k": COLUMNS(), "attend.v": COLUMNS(), "attend.out": ROWS(),
    "mlp.0": COLUMNS(), "mlp.2": ROWS(),
}  # fmt: skip
PLANS: Mapping[str, Mapping[str, Any]] = {
    "everything": {
        **BLOCK,
        "embed": ROWS(input_layouts=WHOLE),
        "head": COLUMNS(output_layouts=WHOLE),
    },
    "DTensors between modules": {
        "mlp.0": COLUMNS(use_local_output=False),
        "mlp.2": ROWS(),
        "head": COLUMNS(output_layouts=WHOLE),
    },
    "inputs cut, features of an embedding": {
        "mlp.2": ROWS(input_layouts=WHOLE),
        "embed": COLUMNS(output_layouts=WHOLE),
    },
    "tokens spread too": {
        **BLOCK,
        "norm_b": SequenceParallel(),
        "mlp": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=WHOLE),
        "attend.out": ROWS(output_layouts=Shard(1)),
        "mlp.2": ROWS(output_layouts=Shard(1)),
        "norm_a": SequenceParallel(),
        "attend": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=WHOLE),
        "embed": ROWS(input_layouts=WHOLE, output_layouts=Shard(1)),
        "head": COLUMNS(input_layouts=Shard(1), output_layouts=WHOLE),
    },
}


class Summed(torch.autograd.Function):
    """A sum over a group; its backward is the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


class GradientSummed(torch.autograd.Function):
    """The identity; its backward sums over a group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class ByHand(nn.Module):
    """The same as the block's ``mlp``, with functions of the user's own between."""

    def __init__(self, mlp: Any, group: Any) -> None:
        super().__init__()
        self.group, mine = group, group.rank()
        self.up = nn.Parameter(mlp[0].weight.detach().chunk(2)[mine].clone())
        self.up_bias = nn.Parameter(mlp[0].bias.detach().chunk(2)[mine].clone())
        self.down = nn.Parameter(mlp[2].weight.detach().chunk(2, 1)[mine].clone())
        self.down_bias = nn.Parameter(mlp[2].bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        x = GradientSummed.apply(x, self.group)  # type: ignore[no-untyped-call]
        x = F.linear(F.gelu(F.linear(x, self.up, self.up_bias)), self.down)
        y: Tensor = Summed.apply(x, self.group) + self.down_bias  # type: ignore[no-untyped-call]
        return y

    def gradients(self) -> dict[str, Tensor | None]:
        return {"mlp.2.bias": self.down_bias.grad}


def mesh_of_both() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))


def whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def differences(
    change: Callable[[Any, DeviceMesh], None],
    length: int = 23,
    *,
    calls: int = 1,
    checkpoints: bool = False,
) -> tuple[float, int, list[str]]:
    """The largest of a loss and all gradients, the ranks of the sequence, and what is gathered."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    stock = Causal(checkpoints=checkpoints).double()
    mesh, source = mesh_of_both(), copy.deepcopy(stock)
    change(source, mesh)
    model: Any = ringfx.optimize(source, mesh=mesh["cp"], compiler="eager")
    numbers = torch.randint(0, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(1))

    def loss(of: Any) -> Tensor:
        return F.cross_entropy(whole(of(numbers)).flatten(0, 1), numbers.flatten())

    for _ in range(calls - 1):
        loss(stock).backward()
        with model.no_sync():
            loss(model).backward()
    expected, found = loss(stock), loss(model)
    expected.backward()
    found.backward()
    worst = float((expected - found).detach().abs())
    gradients = {n: whole(p.grad) for n, p in source.named_parameters()}
    gradients |= source.mlp.gradients() if isinstance(source.mlp, ByHand) else {}
    compared = {n: p.grad for n, p in stock.named_parameters() if n in gradients}
    assert len(compared) > 12
    for name, right in compared.items():
        assert right is not None
        worst = max(worst, float((gradients[name] - right).abs().max()))
    with torch.no_grad():
        worst = max(worst, float((whole(model(numbers)) - stock(numbers)).abs().max()))
    plan = model.plan
    assert len(plan.layers) == 1
    return worst, plan.world_size, [c.reason for c in plan.collectives if c.kind.gathers]


def parallelized(name: str, model: nn.Module, mesh: DeviceMesh) -> None:
    parallelize_module(model, mesh["tp"], dict(PLANS[name]))


def sharded_too(name: str, model: Any, mesh: DeviceMesh) -> None:
    """``fully_shard``, whose hooks break the graph: embedding and head are called uncompiled."""
    parallelized(name, model, mesh)
    for part in (model.attend, model.mlp, model):
        fully_shard(part, mesh=mesh["cp"])


@pytest.mark.parametrize(
    ("name", "length", "options"),
    [
        ("everything", 23, {"checkpoints": True}),
        ("DTensors between modules", 22, {}),
        ("inputs cut, features of an embedding", 23, {"calls": 2}),
    ],
)
def test_results_are_those_of_the_unsplit_model(
    ranks4: RankPool, name: str, length: int, options: dict[str, Any]
) -> None:
    change = functools.partial(parallelized, name)
    for worst, ranks, gathered in ranks4.run(differences, change, length, **options):
        assert worst < 1e-10
        assert (ranks, gathered) == (2, [])


@pytest.mark.parametrize("name", ["everything", "inputs cut, features of an embedding"])
def test_fully_shard_may_shard_the_parts(ranks4: RankPool, name: str) -> None:
    for worst, ranks, _ in ranks4.run(differences, functools.partial(sharded_too, name)):
        assert worst < 1e-10
        assert ranks == 2


def heard(change: Callable[[Any, DeviceMesh], None]) -> tuple[float, bool]:
    """The difference, and whether it is said that tokens are whole where they are spread too."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ringfx").addHandler(handler)
    try:
        worst, _, _ = differences(change, 24)
    finally:
        logging.getLogger("ringfx").removeHandler(handler)
    return worst, any("tensor parallelism spreads tokens over its own ranks" in x for x in said)


def test_tokens_that_tensor_parallelism_spreads_too_are_whole_and_said(ranks4: RankPool) -> None:
    change = functools.partial(parallelized, "tokens spread too")
    for worst, is_said in ranks4.run(heard, change):
        assert worst < 1e-10
        assert is_said


def by_hand(model: Any, mesh: DeviceMesh) -> None:
    model.mlp = ByHand(model.mlp, mesh["tp"].get_group())


def test_collectives_in_functions_of_the_users_own_stay(ranks4: RankPool) -> None:
    for worst, ranks, gathered in ranks4.run(differences, by_hand):
        assert worst < 1e-10
        assert (ranks, gathered) == (2, [])


def over_the_sequence(model: Any, mesh: DeviceMesh) -> None:
    model.mlp = ByHand(model.mlp, mesh["cp"].get_group())


def without_plain_results(model: nn.Module, mesh: DeviceMesh) -> None:
    parallelize_module(model, mesh["tp"], {"head": COLUMNS(use_local_output=False)})


def over_all_ranks(model: nn.Module, mesh: DeviceMesh) -> None:
    parallelize_module(model, init_device_mesh("cpu", (4,)), {"mlp.0": COLUMNS(), "mlp.2": ROWS()})


def uneven(model: Any, mesh: DeviceMesh) -> None:
    model.mlp = nn.Sequential(nn.Linear(HIDDEN, 33), nn.Linear(33, HIDDEN)).double()
    parallelize_module(model, mesh["tp"], {"mlp.0": COLUMNS(output_layouts=WHOLE)})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (without_plain_results, "output 0 of the program is a DTensor placed as Shard(2)"),
        (over_all_ranks, "are in both, so they hold different parts of it"),
        (over_the_sequence, "are in both, and would join other tokens"),
        (uneven, "parts must be equal. Do: choose a size that 2 divides"),
    ],
)
def test_what_cannot_work_is_refused_by_name(
    ranks4: RankPool, change: Callable[[Any, DeviceMesh], None], text: str
) -> None:
    for said in raises(ranks4, differences, change):
        assert text in said
