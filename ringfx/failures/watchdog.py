"""A thread that looks after a rank that waits: has another one failed, or do all wait in vain?

It reads the store only while something has been due for a while, so a step that goes well costs
nothing. What ends a wait before the group's timeout is a failure that was posted and does not
break the connection that is waited for (rank 2 waits for rank 0, which computes; rank 1 failed), a
process that has ended, and ranks that wait for each other (``ringfx.failures.wait_graph``).

A rank that waits in a collective of the user's reads in its log what has failed elsewhere. On a
device its messages are ended.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from dataclasses import dataclass, field
from multiprocessing.util import Finalize
from typing import Any

import torch.distributed as dist

from ringfx.failures.abort import abort, may_be_aborted
from ringfx.failures.channel import GONE, Channel, Failure, Wait, channel_of, channels
from ringfx.failures.user_collectives import Outside, main_thread_at, where_outside
from ringfx.failures.wait_graph import Stand, in_vain
from ringfx.torch_compat.distributed import group_named

__all__ = ["start_watching", "watch"]

log = logging.getLogger("ringfx")

TICK_S = 0.25
LOOK_TICKS = 2
"""A wait that so many looks have seen is looked into, and told to the others. Looks are counted,
not seconds: a process that the machine lets not run has not waited."""

PATIENT_TICKS = 20
"""After so many looks at the same places of all ranks, what was on its way has come."""

_WHY = (
    "One rank caught an error that the others did not get (in backward, for example); or it left "
    "out, or added, a call, a backward or a use of an output (batches ended earlier, no_sync, "
    "clipping or a step under `if rank == 0`). Do: do the same on every rank."
)

ABORT_TICKS = {True: 8, False: 40}
"""So long the main thread stands at one instruction before its device's messages are ended: where
the rank that failed does not come back, and where it may."""

DEVICE_TICKS = 8
"""Between two looks at the store where messages run on a device, so that no wait is seen."""


@dataclass
class _Watched:
    """What the thread knows of one channel."""

    store: Any
    is_device: bool
    said: str = ""
    """What this rank was said to wait in; "" for nothing."""
    seen: list[str] = field(default_factory=list)
    seen_ticks: int = 0
    number: int = 0
    """Of the wait that was looked at last."""
    ticks: int = 0
    at: tuple[int, int] = (0, 0)
    at_ticks: int = 0
    """Looks at which the main thread was ``at`` one instruction."""
    told: Failure | None = None
    """What was written to the log."""
    aborted: bool = False


_WATCHED: weakref.WeakKeyDictionary[Channel, _Watched] = weakref.WeakKeyDictionary()
_STARTED = threading.Event()
_ENDING = threading.Event()

AFTER_REPORT = 50
"""Of steps at exit the highest number comes first; ``process_exit`` reports at 100."""

LONGEST_LOOK_S = 10.0
"""A store whose process is gone keeps the thread; longer than this nobody waits for it."""


def start_watching(name: str) -> None:
    """Look after the group of that name before its ranks' first message."""
    with contextlib.suppress(RuntimeError):  # a store that is none: torch's fake process group
        channel = channel_of(group_named(name))
        channel.introduce()
        watch(channel)


def watch(channel: Channel) -> None:
    """Look after this channel from now on."""
    if channel not in _WATCHED:
        is_device = may_be_aborted(_group(channel))
        _WATCHED[channel] = _Watched(store=channel.clone_of_store(), is_device=is_device)
    if not _STARTED.is_set():
        from ringfx.failures.process_exit import register_exit_report

        register_exit_report()
        _STARTED.set()
        _start_thread()


def _start_thread() -> None:
    """It ends before the interpreter does.

    A thread that Python ends while it is inside the store's C++ takes the process with it (SIGABRT,
    "terminate called without an active exception").
    """
    thread = threading.Thread(target=_watch, name="ringfx-watch", daemon=True)
    thread.start()
    Finalize(None, _end, args=(thread,), exitpriority=AFTER_REPORT)


def _end(thread: threading.Thread) -> None:
    _ENDING.set()
    thread.join(LONGEST_LOOK_S)


def _group(channel: Channel) -> Any:
    return group_named(channel.name)


def _watch() -> None:
    while not _ENDING.wait(TICK_S):
        _look_at_all()


def _look_at_all() -> None:
    outside = where_outside()
    for channel in channels():
        channel.close_retired()
        known = _WATCHED.get(channel)
        if known is None:
            continue
        wait = channel.wait
        try:
            _look(channel, known, wait, None if wait is not None else outside)
            if known.is_device:
                _look_at_device(channel, known)
        except RuntimeError:  # the store's process has ended, and nobody else will come
            if wait is not None and wait is channel.wait:
                channel.close()


def _look(channel: Channel, known: _Watched, wait: Wait | None, outside: Outside | None) -> None:
    place = wait or outside
    _count(known, 0 if place is None else place.number)
    if known.ticks < LOOK_TICKS and not known.said:
        return
    if wait is not None and known.ticks >= LOOK_TICKS and _has_ended(channel, known, wait):
        channel.close()
    if outside is not None:
        _tell_user(channel, known, outside.what)
    _say(channel, known, _stand(channel, wait, outside) if known.ticks >= LOOK_TICKS else None)
    if known.said:
        _compare(channel, known)


def _has_ended(channel: Channel, known: _Watched, wait: Wait) -> bool:
    failure = channel.failure(known.store)
    if failure is not None:
        return failure.ends(wait)
    return channel.dead_rank(known.store) is not None


def _count(known: _Watched, number: int) -> None:
    known.ticks = known.ticks + 1 if number and number == known.number else 0
    known.number = number


def _stand(channel: Channel, wait: Wait | None, outside: Outside | None) -> Stand | None:
    epoch, counts = channel.epoch, channel.counts
    if wait is not None:
        return Stand(
            epoch=epoch, number=wait.number, what=wait.what, is_meeting=wait.is_meeting,
            counts=counts,
        )  # fmt: skip
    if outside is None:
        return None
    members = dist.get_process_group_ranks(_group(channel))
    holds = [r for r, member in enumerate(members) if member in outside.holds]
    return Stand(
        epoch=epoch, number=outside.number, what=outside.what, is_meeting=False, counts=counts,
        holds=holds, is_outside=True,
    )  # fmt: skip


def _say(channel: Channel, known: _Watched, stand: Stand | None) -> None:
    text = "" if stand is None else stand.text()
    if text != known.said:
        known.store.set(f"waits{channel.rank}", text)
        known.said = text


def _compare(channel: Channel, known: _Watched) -> None:
    keys = [f"waits{r}" for r in range(channel.size)]
    now = [known.store.get(key).decode() if known.store.check([key]) else "" for key in keys]
    known.seen_ticks = known.seen_ticks + 1 if now == known.seen else 0
    known.seen = now
    stands = {r: Stand.read(text) for r, text in enumerate(now) if text}
    if in_vain(stands, patient=known.seen_ticks >= PATIENT_TICKS):
        listed = "; ".join(f"rank {r} waits in {stand.what}" for r, stand in stands.items())
        text = f"the ranks wait for each other: {listed}. {_WHY}"
        channel.post(text, of_all=True, store=known.store)
        channel.close()


def _tell_user(channel: Channel, known: _Watched, where: str) -> None:
    """Write once to the log what has failed on another rank, while this one cannot be ended."""
    failure = channel.failure(known.store)
    if failure is None or failure == known.told or failure.is_of(channel.rank):
        return
    known.told = failure
    level = logging.ERROR if failure.is_error else logging.WARNING
    log.log(level, "rank %d waits in %s, but %s", channel.rank, where, failure.text)


def _look_at_device(channel: Channel, known: _Watched) -> None:
    """Another rank has failed, and the main thread stands where it may wait for the device."""
    at = main_thread_at()
    known.at_ticks = known.at_ticks + 1 if at == known.at else 0
    known.at = at
    if known.aborted or not known.at_ticks or known.at_ticks % DEVICE_TICKS:
        return
    failure = channel.failure(known.store)
    if failure is None or failure.is_of(channel.rank) or not failure.is_error:
        return
    _tell_user(channel, known, "communication of its device")
    if known.at_ticks >= ABORT_TICKS[failure.epoch == GONE]:
        known.aborted = abort(_group(channel))
