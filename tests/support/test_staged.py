"""The test's own process group for several ranks on one GPU, here with CPU tensors.

Over it ringfx takes the way of NCCL: torch's collectives on the user's group, not its own messages.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist

import ringfx
from ringfx.split_tensor.tensor import SplitTensor
from tests.end_to_end.models import plain, tokens
from tests.ops.cases import examples
from tests.ops.oracle import Example, Result, assemble, difference, reference, run
from tests.support import staged
from tests.support.harness import gradient_differences
from tests.support.ranks import RankPool

pytestmark = pytest.mark.ranks

KINDS = ("causal", "padding", "cross", "bias matrix a head", "sinks, trained")
TOLERANCE = 1e-10


def _group() -> dist.ProcessGroup:
    staged.register()
    found = dist.new_group(backend=staged.BACKEND)
    assert isinstance(found, staged.StagedGroup)
    return found


def collectives() -> dict[str, torch.Tensor]:
    """What each of the group's collectives gives on this rank."""
    group, rank, size = _group(), dist.get_rank(), dist.get_world_size()
    mine = torch.arange(4.0).view(2, 2) + 10 * rank
    gathered = torch.empty(size * 2, 2)
    dist.all_gather_into_tensor(gathered, mine, group=group)
    pieces = [torch.empty(2, 2) for _ in range(size)]
    dist.all_gather(pieces, mine, group=group)
    scattered = torch.empty(1, 2)
    dist.reduce_scatter_tensor(scattered, torch.arange(2.0 * size).view(size, 2), group=group)
    turned = torch.empty(size, 2)
    dist.all_to_all_single(turned, torch.full((size, 2), float(rank)), group=group)
    largest = mine.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    first = mine.clone()
    dist.broadcast(first, 0, group=group)
    left = torch.empty_like(mine)
    for work in dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, mine, group=group, group_peer=(rank + 1) % size),
            dist.P2POp(dist.irecv, left, group=group, group_peer=(rank - 1) % size),
        ]
    ):
        work.wait()
    dist.barrier(group=group)
    return {
        "gathered": gathered,
        "pieces": torch.cat(pieces),
        "scattered": scattered,
        "turned": turned,
        "largest": largest,
        "first": first,
        "left": left,
    }


def test_its_collectives_are_those_of_torch(ranks3: RankPool) -> None:
    first = torch.arange(4.0).view(2, 2)
    whole = torch.cat([first, first + 10, first + 20])
    for rank, found in enumerate(ranks3.run(collectives)):
        expected = {
            "gathered": whole,
            "pieces": whole,
            "scattered": 3 * torch.tensor([[2.0 * rank, 2.0 * rank + 1]]),
            "turned": torch.arange(3.0)[:, None].expand(3, 2),
            "largest": first + 20,
            "first": first,
            "left": first + 10 * ((rank - 1) % 3),
        }
        torch.testing.assert_close(found, expected)


def attention(some: Sequence[Example]) -> list[tuple[dict[str, torch.Tensor], ...]]:
    torch.set_num_threads(1)
    group = _group()
    return [run(example, group) for example in some]


@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_attention_is_exact_over_it(request: pytest.FixtureRequest, world_size: int) -> None:
    pool: RankPool = request.getfixturevalue(f"ranks{world_size}")
    some = list(examples(world_size, KINDS))
    for example, by_rank in zip(some, zip(*pool.run(attention, some), strict=True), strict=True):
        expected: Result = reference(example)
        found = assemble(example, by_rank)
        worst = max(difference(found, expected).values())
        assert worst <= TOLERANCE, (example.label, worst)


def step() -> tuple[bool, float, dict[str, float]]:
    """Whether logits are split, how far the loss and the gradients are from the unsplit model's."""
    group = _group()
    torch._dynamo.reset()
    stock = plain()().double()
    ours = copy.deepcopy(stock)
    model = ringfx.optimize(ours, mesh=group, compiler="aot_eager")
    ids = tokens(29, 2)
    expected, found = stock(ids, ids)[0], model(ids, ids)
    expected.backward()
    found[0].backward()
    mine, oracle = ({n: p.grad for n, p in m.named_parameters()} for m in (ours, stock))
    is_split = any(isinstance(x, SplitTensor) for x in found)
    return is_split, abs(float(found[0] - expected)), gradient_differences(mine, oracle)


def test_a_model_is_split_over_it(ranks2: RankPool) -> None:
    for is_split, loss, gradients in ranks2.run(step):
        assert is_split
        assert loss < TOLERANCE
        assert max(gradients.values()) < TOLERANCE
