"""What the watching thread does for a group whose messages run on a device; fakes stand in."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, cast

import pytest
import torch

from ringfx.failures import watchdog
from ringfx.failures.abort import abort, may_be_aborted
from ringfx.failures.channel import GONE, Channel, Failure


class Backend:
    def __init__(self) -> None:
        self.aborts = 0

    def abort(self) -> None:
        self.aborts += 1


class Old:
    """A group that has no abort of its own."""

    def __init__(self, device: str = "cuda") -> None:
        self._device_types = [torch.device(device)]
        self.backend = Backend()

    def _get_backend(self, device: torch.device) -> Backend:
        return self.backend


class New(Old):
    def abort(self) -> None:
        self.backend.abort()


class Refusing(Old):
    def abort(self) -> None:
        raise RuntimeError("no communicator")


class Without(Old):
    def _get_backend(self, device: torch.device) -> Any:
        return object()


@pytest.mark.parametrize(("group", "done"), [(Old, 1), (New, 1), (Refusing, 1), (Without, 0)])
def test_a_group_is_aborted_by_whatever_it_has(group: type[Old], done: int) -> None:
    made = group()
    assert abort(made) == bool(done)
    assert made.backend.aborts == done


def test_gloo_is_left_alone() -> None:
    assert may_be_aborted(Old())
    assert not may_be_aborted(Old("cpu"))


class Told:
    """A channel of rank 0 that hears of a failure."""

    rank = 0

    def __init__(self, found: Failure | None) -> None:
        self.found = found

    def failure(self, store: Any = None) -> Failure | None:
        return self.found


def failure(*, epoch: int = 1, rank: int = 1, is_error: bool = True) -> Failure:
    return Failure(epoch=epoch, call=1, rank=rank, text="rank 1 raised", is_error=is_error)


@pytest.mark.parametrize(
    ("found", "moves", "first"),
    [
        (failure(epoch=GONE), False, watchdog.ABORT_TICKS[True]),
        (failure(), False, watchdog.ABORT_TICKS[False]),
        (failure(), True, None),
        (failure(rank=0), False, None),
        (failure(is_error=False), False, None),
        (None, False, None),
    ],
)
def test_a_rank_that_stands_still_after_a_failure_is_ended(
    monkeypatch: pytest.MonkeyPatch, found: Failure | None, moves: bool, first: int | None
) -> None:
    group, looks = New(), 100
    steps = iter(range(1, looks + 1))
    monkeypatch.setattr(watchdog, "main_thread_at", lambda: (1, next(steps) if moves else 0))
    monkeypatch.setattr(watchdog, "_group", lambda channel: group)
    known, channel = watchdog._Watched(store=None, is_device=True), cast(Channel, Told(found))
    aborted = [
        watchdog._look_at_device(channel, known) or group.backend.aborts for _ in range(looks)
    ]
    assert aborted == [int(first is not None and i >= first) for i in range(looks)]


ENDS_WHILE_IT_LOOKS = """
import time
import torch.distributed as dist
from ringfx.failures import watchdog

store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
watchdog.TICK_S = 0.0
watchdog._look_at_all = lambda: [store.check([key]) for key in map(str, range(500))]
watchdog._start_thread()
time.sleep(0.2)
print("done")
"""


def test_a_process_may_end_while_the_thread_looks_at_the_store() -> None:
    for _ in range(3):
        ended = subprocess.run(
            [sys.executable, "-c", ENDS_WHILE_IT_LOOKS], capture_output=True, text=True, check=False
        )
        assert (ended.returncode, ended.stdout) == (0, "done\n"), ended.stderr
