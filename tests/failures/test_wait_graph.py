"""Which ranks wait for each other in vain, by what they have begun."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ringfx.failures.wait_graph import Counts, Stand, in_vain


def stand(*, meeting: bool = False, **counts: Any) -> Stand:
    known = replace(Counts.none(3), **counts)
    return Stand(epoch=1, number=4, what="somewhere", is_meeting=meeting, counts=known)


def barrier(*, holds: tuple[int, ...] = (0, 1, 2), **counts: Any) -> Stand:
    return replace(stand(**counts), is_outside=True, holds=list(holds))


MET = stand(meeting=True, meetings=2, sent=[4, 0, 0])
"""Rank 1 at its second meeting, after four messages to rank 0."""


@pytest.mark.parametrize(
    ("at_zero", "patient", "found"),
    [
        (stand(meetings=1, taken=[0, 5, 0]), False, True),  # the fifth was never sent
        (stand(meetings=1, taken=[0, 4, 0]), True, False),  # on its way
        (stand(meetings=2, taken=[0, 5, 0]), True, False),  # it has left that meeting
        (stand(meetings=1, sums=1), False, True),
        (stand(meetings=1, meeting=True), True, False),  # the other's word is on its way
        (barrier(), False, False),  # over, and its last message on its way
        (barrier(), True, True),
        (barrier(holds=()), True, False),  # a broadcast, which may end without rank 1
        (barrier(holds=(0, 2)), True, False),
        (replace(stand(meetings=1, taken=[0, 5, 0]), epoch=0), True, False),
    ],
)
def test_who_waits_for_a_rank_at_a_meeting(at_zero: Stand, patient: bool, found: bool) -> None:
    assert in_vain({0: at_zero, 1: MET}, patient=patient) == found


@pytest.mark.parametrize("taken", [0, 1])
def test_a_message_of_a_rank_at_a_barrier(taken: int) -> None:
    stands = {0: stand(taken=[0, taken, 0]), 1: barrier()}
    assert in_vain(stands, patient=True) == bool(taken)
    assert not in_vain(stands, patient=False)


def test_three_ranks_one_of_them_elsewhere() -> None:
    assert in_vain({0: stand(meetings=1, taken=[0, 5, 0]), 1: MET}, patient=False)
    assert not in_vain({2: stand(meetings=1, taken=[0, 0, 0]), 1: MET}, patient=True)


def test_it_travels() -> None:
    assert Stand.read(MET.text()) == MET
