"""A rank that dies or stops at any message: the others raise, name it, and do not hang."""

from __future__ import annotations

import random
import signal

import pytest

from tests.failures.faults import TIMEOUT_S, Survivor, survivors

STRATEGIES = ("simple", "collective", "production", "ulysses")
MESSAGES = {"simple": 14, "collective": 6, "production": 16, "ulysses": 22}
"""How many messages two steps of three ranks have, about."""


def _check(found: list[Survivor], victim: int) -> None:
    for survivor in found:
        assert not survivor.hung, survivor
        assert survivor.error == "CommunicationError", survivor
        assert "layers.7: " in survivor.text, survivor
        assert "forward: " in survivor.text or "backward: " in survivor.text, survivor
        assert f"rank {survivor.rank} of 3 was waiting for rank" in survivor.text, survivor
        assert survivor.seconds < 10 * TIMEOUT_S, survivor  # of a busy machine; never a hang
    # A survivor may have waited for another one that had given up already, but not all of them.
    assert any(_waits_for(survivor, victim) for survivor in found), found


def _waits_for(survivor: Survivor, victim: int) -> bool:
    waited = survivor.text.split("was waiting for rank")[1].split(":")[0]
    return str(victim) in waited


def _random_fault(number: int, how: signal.Signals) -> None:
    draw = random.Random(number)
    strategy = STRATEGIES[number % 4]
    victim, message = draw.randrange(3), draw.randint(1, MESSAGES[strategy])
    found = survivors(size=3, strategy=strategy, victim=victim, message=message, how=how)
    _check(found, victim)


@pytest.mark.ranks
@pytest.mark.parametrize(
    "number", [n if n < 12 else pytest.param(n, marks=pytest.mark.slow) for n in range(46)]
)
def test_a_killed_rank_is_an_error_on_all_others(number: int) -> None:
    _random_fault(number, signal.SIGKILL)


@pytest.mark.ranks
@pytest.mark.parametrize(
    "number", [100, *(pytest.param(n, marks=pytest.mark.slow) for n in range(101, 104))]
)
def test_a_stopped_rank_is_an_error_on_all_others(number: int) -> None:
    _random_fault(number, signal.SIGSTOP)
