"""shard and gather: what each rank gets, and that each is the other's backward."""

from __future__ import annotations

import pytest
import torch

from ringfx import ops
from ringfx.errors import InvalidArgument
from ringfx.ir.layout import Layout, LayoutKind
from tests.support.ranks import RankPool


def _round_trips(lengths: list[int]) -> list[str]:
    wrong = []
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for layout in ("contiguous", "zigzag"):
        for length in lengths:
            x = torch.arange(2 * length * 3, dtype=torch.float64).view(2, length, 3)
            x.requires_grad_()
            local = ops.shard(x, 1, layout=layout)
            positions = Layout(layout, length, size).positions(rank)
            real = positions < length
            if not torch.equal(local[:, real], x[:, positions[real]]) or local[:, ~real].any():
                wrong.append(f"{layout} {length}: shard")
            whole = ops.gather(local, 1, layout=layout, length=length)
            if not torch.equal(whole, x):
                wrong.append(f"{layout} {length}: gather")
            weights = torch.sin(torch.arange(x.numel(), dtype=torch.float64)).view(x.shape)
            (gradient,) = torch.autograd.grad(whole, x, weights)
            if not torch.equal(gradient, weights):
                wrong.append(f"{layout} {length}: backward")
    return wrong


@pytest.mark.ranks
def test_every_length_survives_a_round_trip(ranks3: RankPool) -> None:
    for wrong in ranks3.run(_round_trips, [1, 2, 3, 5, 6, 7, 11, 12, 13]):
        assert wrong == []


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_one_rank_without_process_group(layout: LayoutKind) -> None:
    x = torch.randn(2, 7, 3)
    local = ops.shard(x, -2, layout=layout)
    torch.testing.assert_close(ops.gather(local, -2, layout=layout, length=7), x)


@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
@pytest.mark.parametrize(("length", "ranks"), [(1, 1), (12, 3), (13, 3), (5, 4), (3, 7), (64, 4)])
def test_the_order_sorts_what_ranks_hold_by_position(
    kind: LayoutKind, length: int, ranks: int
) -> None:
    layout = Layout(kind, length, ranks)
    everyone = torch.cat([layout.positions(rank) for rank in range(ranks)])
    assert torch.equal(everyone[layout.order()], torch.arange(length))


def test_a_length_that_does_not_fit_is_an_error() -> None:
    text = "gather: 7 tokens on each of 1 ranks cannot be 9 in all"
    with pytest.raises(InvalidArgument, match=text):
        ops.gather(torch.randn(2, 7), 1, length=9)


def test_a_dim_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(InvalidArgument, match=r"dim 2 of a tensor of shape \(2, 7\)"):
        ops.shard(torch.randn(2, 7), 2)
