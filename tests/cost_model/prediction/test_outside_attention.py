from __future__ import annotations

import pytest

from ringfx.cost_model.prediction.outside_attention import outside_ms
from ringfx.ir.values import Collective, CommKind
from tests.cost_model.sites import shipped

H100 = shipped("h100-sxm-published")


def _move(kind: CommKind, size: int) -> Collective:
    return Collective(node="n", name="m", source="f:1", kind=kind, bytes_moved=size, reason="why")


def test_a_gather_receives_what_a_rank_did_not_have() -> None:
    row = H100.link("all_gather", 4)
    expected_ms = 3 * row.latency_us / 1e3 + 3 / 4 * 2**30 / row.gbytes_per_s / 1e6
    assert outside_ms([_move(CommKind.ALL_GATHER, 2**30)], 4, H100) == pytest.approx(expected_ms)


def test_a_reduce_scatter_receives_the_others_parts() -> None:
    part, whole = _move(CommKind.REDUCE_SCATTER, 2**28), _move(CommKind.ALL_GATHER, 2**30)
    assert outside_ms([part], 4, H100) == pytest.approx(outside_ms([whole], 4, H100))


def test_one_rank_sends_nothing_and_times_add_up() -> None:
    moves = [_move(CommKind.ALL_GATHER, 2**20), _move(CommKind.ALL_REDUCE, 2**20)]
    assert outside_ms(moves, 1, H100) == 0
    assert outside_ms(moves, 8, H100) == pytest.approx(
        sum(outside_ms([move], 8, H100) for move in moves)
    )
