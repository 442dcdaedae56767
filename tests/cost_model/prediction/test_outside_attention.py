from __future__ import annotations

from dataclasses import replace

import pytest

from ringfx.cost_model import choose
from ringfx.cost_model.prediction.outside_attention import hidden_ms, outside_ms
from ringfx.ir.values import Collective, CommKind
from tests.cost_model.sites import causal_site, shipped

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


def _states(count: int, size: int = 2**28) -> list[Collective]:
    there, back = _move(CommKind.ALL_GATHER_STATES, size), _move(CommKind.REDUCE_SCATTER, size // 4)
    back = replace(back, in_backward=True)
    return [there, replace(there, in_backward=True), back] * count


def test_of_states_all_but_the_first_and_the_last_message_hide_behind_long_attention() -> None:
    layers = choose([causal_site(tokens=2**19)], world_size=4, profile=H100)
    for count in (1, 3):
        moves = _states(count)
        hidden = hidden_ms(moves, layers, 4, H100)
        assert hidden == pytest.approx(outside_ms(moves, 4, H100) * (count - 1) / count)


def test_no_more_is_hidden_than_attention_computes() -> None:
    layers = choose([causal_site(tokens=512)], world_size=4, profile=H100, strategy="collective")
    hidden = hidden_ms(_states(50), layers, 4, H100)
    assert 0 < hidden <= sum(layer.compute_ms for layer in layers) * 1.001


def test_other_messages_are_not_said_to_be_hidden() -> None:
    layers = choose([causal_site(tokens=2**19)], world_size=4, profile=H100)
    moves = [_move(CommKind.ALL_GATHER, 2**28), _move(CommKind.REDUCE_SCATTER, 2**28)]
    assert hidden_ms(moves * 3, layers, 4, H100) == 0
