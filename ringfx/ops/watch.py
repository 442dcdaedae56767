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

SAY_AFTER_S = 1.0
"""From then on the other ranks are told what this one waits in."""

STUCK_S = 6.0
"""All ranks have waited in the same places for so long, and not in the same thing: nobody moves."""


@dataclass
class _Watched:
    """What the thread knows of one channel."""

    store: Any
    said: str = ""
    """What this rank was said to wait in; "" for nothing."""
    seen: list[str] = field(default_factory=list)
    seen_at: float = 0.0


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
        for channel in channels():
            channel.close_retired()
            known = _WATCHED.get(channel)
            if known is not None:
                _look(channel, known)
        channel = known = None


def _look(channel: Channel, known: _Watched) -> None:
    wait = channel.wait
    waited = 0.0 if wait is None else time.monotonic() - wait.since
    if waited < LOOK_AFTER_S and not known.said:
        return
    try:
        failure = None if wait is None else channel.failure(known.store)
        if wait is not None and failure is not None and failure.ends(wait):
            channel.close()
        _say(channel, known, wait if waited > SAY_AFTER_S else None)
        if wait is not None and waited > SAY_AFTER_S:
            _compare(channel, known)
    except RuntimeError:  # the store's process has ended, and nobody else will come
        if wait is not None and wait is channel.wait:
            channel.close()


def _say(channel: Channel, known: _Watched, wait: Wait | None) -> None:
    text = "" if wait is None else json.dumps([wait.number, wait.what, wait.is_meeting])
    if text != known.said:
        known.store.set(f"waits{channel.rank}", text)
        known.said = text


def _compare(channel: Channel, known: _Watched) -> None:
    keys = [f"waits{r}" for r in range(channel.size)]
    now = [known.store.get(key).decode() if known.store.check([key]) else "" for key in keys]
    if now != known.seen:
        known.seen, known.seen_at = now, time.monotonic()
    if not all(now) or time.monotonic() - known.seen_at < STUCK_S:
        return
    waits = [json.loads(text) for text in now]
    meeting = any(is_meeting for _, _, is_meeting in waits)
    if meeting and len({what for _, what, _ in waits}) > 1:
        listed = "; ".join(f"rank {r} waits in {what}" for r, (_, what, _) in enumerate(waits))
        text = f"the ranks wait for each other: {listed}"
        channel.post(text, of_all=True, store=known.store)
        channel.close()
