"""Messages between two ranks, larger than what gloo is given at once."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist

from ringfx.comm import process_group as messages
from ringfx.comm.process_group import PIECE_BYTES, Ranks
from tests.support.ranks import RankPool

Tensor = torch.Tensor
LENGTHS = (1, PIECE_BYTES // 4, PIECE_BYTES // 4 + 1, 3 * PIECE_BYTES // 4 + 5)


def _content(rank: int, tag: int, length: int) -> Tensor:
    return torch.arange(length, dtype=torch.float32) + 1000 * rank + 7 * tag


def _exchanged(most_pieces: int) -> list[tuple[int, int, Tensor]]:
    """Of every length two messages, under way together, and waited for in the other order."""
    assert dist.group.WORLD is not None
    ranks = Ranks.named(str(dist.group.WORLD.group_name), "test")
    found = []
    with mock.patch.object(messages, "MOST_PIECES", most_pieces):
        for length in LENGTHS:
            started = [
                ranks.exchange(
                    "exchange",
                    send=_content(ranks.rank, tag, length),
                    to=ranks.neighbour(1),
                    receive=torch.empty(length),
                    source=ranks.neighbour(-1),
                    tag=tag,
                )
                for tag in (0, 1)
            ]
            found += [(length, tag, started[tag].wait()) for tag in (1, 0)]
    return found


@pytest.mark.ranks
@pytest.mark.parametrize("most_pieces", [256, 2])
@pytest.mark.parametrize("size", [2, 3])
def test_messages_in_pieces_arrive_whole_and_are_not_mixed(
    size: int, most_pieces: int, request: pytest.FixtureRequest
) -> None:
    pool: RankPool = request.getfixturevalue(f"ranks{size}")
    for rank, found in enumerate(pool.run(_exchanged, most_pieces)):
        for length, tag, received in found:
            expected = _content((rank - 1) % size, tag, length)
            assert torch.equal(received, expected), (rank, length, tag)
