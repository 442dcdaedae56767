"""A thread that looks after a rank that waits: has another one failed, or do all wait in vain?

It reads the store only while a message has been due for a while, so a step that goes well costs
nothing. Two things end a wait before the group's timeout: a failure that was posted and does not
break the connection that is waited for (rank 2 waits for rank 0, which computes; rank 1 failed),
and ranks that wait for different things: one touches an output, the other is in the next call.
"""

from __future__ import annotations

import json
import threading
import time
import weakref
from dataclasses import dataclass, field
from typing import Any

from ringfx.ops.channel import Channel, Wait, channels

__all__ = ["watch"]

TICK_S = 0.25
LOOK_AFTER_S = 0.5
"""A message that is due so long is looked into."""

STUCK_TICKS = 12
"""After so many looks at one wait a rank tells the others of it. Where all ranks have told, of
different things, and nothing changes for as many again, nobody moves. Looks are counted, not
seconds: a process that the machine lets not run has not waited."""


@dataclass
class _Watched:
    """What the thread knows of one channel."""

    store: Any
    said: str = ""
    """What this rank was said to wait in; "" for nothing."""
    seen: list[str] = field(default_factory=list)
    seen_ticks: int = 0
    number: int = 0
    """Of the wait that was looked at last."""
    ticks: int = 0


_WATCHED: weakref.WeakKeyDictionary[Channel, _Watched] = weakref.WeakKeyDictionary()
_STARTED = threading.Event()


def watch(channel: Channel) -> None:
    """Look after this channel from now on."""
    if channel not in _WATCHED:
        _WATCHED[channel] = _Watched(store=channel.clone_of_store())
    if not _STARTED.is_set():
        from ringfx.ops.leaving import tell_when_leaving

        tell_when_leaving()
        _STARTED.set()
        threading.Thread(target=_watch, name="ringfx-watch", daemon=True).start()


def _watch() -> None:
    while True:
        time.sleep(TICK_S)
        _look_at_all()


def _look_at_all() -> None:
    for channel in channels():
        channel.close_retired()
        known = _WATCHED.get(channel)
        if known is not None:
            _look(channel, known)


def _look(channel: Channel, known: _Watched) -> None:
    wait = channel.wait
    waited = 0.0 if wait is None else time.monotonic() - wait.since
    if waited < LOOK_AFTER_S and not known.said:
        return
    try:
        failure = None if wait is None else channel.failure(known.store)
        if wait is not None and failure is not None and failure.ends(wait):
            channel.close()
        _count(known, wait)
        _say(channel, known, wait if known.ticks >= STUCK_TICKS else None)
        if known.said:
            _compare(channel, known)
    except RuntimeError:  # the store's process has ended, and nobody else will come
        if wait is not None and wait is channel.wait:
            channel.close()


def _count(known: _Watched, wait: Wait | None) -> None:
    number = 0 if wait is None else wait.number
    known.ticks = known.ticks + 1 if number and number == known.number else 0
    known.number = number


def _say(channel: Channel, known: _Watched, wait: Wait | None) -> None:
    text = "" if wait is None else json.dumps([wait.number, wait.what, wait.is_meeting])
    if text != known.said:
        known.store.set(f"waits{channel.rank}", text)
        known.said = text


def _compare(channel: Channel, known: _Watched) -> None:
    keys = [f"waits{r}" for r in range(channel.size)]
    now = [known.store.get(key).decode() if known.store.check([key]) else "" for key in keys]
    known.seen_ticks = known.seen_ticks + 1 if now == known.seen else 0
    known.seen = now
    if not all(now) or known.seen_ticks < STUCK_TICKS:
        return
    waits = [json.loads(text) for text in now]
    meeting = any(is_meeting for _, _, is_meeting in waits)
    if meeting and len({what for _, what, _ in waits}) > 1:
        listed = "; ".join(f"rank {r} waits in {what}" for r, (_, what, _) in enumerate(waits))
        text = f"the ranks wait for each other: {listed}"
        channel.post(text, of_all=True, store=known.store)
        channel.close()
