"""Tokens from one split to another: every element arrives, once, at the place that wants it."""

from __future__ import annotations

import itertools

import pytest
import torch

from ringfx.comm.redistribute import Spread, _routes

LENGTH = 24


def spreads(ranks: int) -> list[Spread]:
    """A dimension of 24 elements, split in several ways."""
    return [
        Spread(kind=0, line=24, ranks=ranks, offset=0, length=24, outer=1, inner=1),
        Spread(kind=1, line=25, ranks=ranks, offset=1, length=24, outer=1, inner=1),
        Spread(kind=0, line=6, ranks=ranks, offset=0, length=6, outer=1, inner=4),
        Spread(kind=1, line=9, ranks=ranks, offset=2, length=4, outer=3, inner=2),
        Spread(kind=0, line=2, ranks=ranks, offset=0, length=2, outer=1, inner=12),
    ]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_element_is_on_one_rank_in_one_place(ranks: int) -> None:
    for spread in spreads(ranks):
        everyone = torch.cat([spread.elements(r) for r in range(ranks)])
        assert everyone[everyone >= 0].sort().values.tolist() == list(range(LENGTH))
        assert len(everyone) == ranks * spread.local


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_what_ranks_send_is_what_the_others_want_in_their_order(ranks: int) -> None:
    for here, there in itertools.product(spreads(ranks), repeat=2):
        for rank in range(ranks):
            arrived = torch.full((there.local,), -1)
            _, receive = _routes(here, there, rank)
            for peer in range(ranks):
                send, _ = _routes(here, there, peer)
                arrived[receive[peer]] = here.elements(peer)[send[rank]]
            assert torch.equal(arrived, there.elements(rank)), (here, there, rank)


def test_a_split_travels_through_a_graph_as_numbers() -> None:
    for spread in spreads(3):
        assert Spread.of(spread.numbers()) == spread
