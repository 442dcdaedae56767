"""A process that ends tells the ranks that may wait for it: with an error of the user's, or done.

What kills it at once (SIGKILL, ``os._exit``) is not told; others see a broken connection.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing.util
import socket
import sys
from types import TracebackType
from typing import Any

import torch.distributed as dist

from ringfx.ops.channel import Channel, channel_of, channels
from ringfx.ops.where import describe_error

__all__ = ["tell_when_leaving"]

_TOLD: set[Channel] = set()


@functools.cache
def tell_when_leaving() -> None:
    """From now on, whatever ends the process; once."""
    usual = sys.excepthook

    def excepthook(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        _tell(error)
        usual(kind, error, trace)

    sys.excepthook = excepthook
    # Run by atexit, and at the end of a process that multiprocessing started.
    multiprocessing.util.Finalize(None, _leave, exitpriority=100)


def _leave() -> None:
    _tell(sys.exc_info()[1])


def _tell(error: BaseException | None) -> None:
    for channel in _channels():
        if channel in _TOLD or not _is_served(channel.store):
            continue
        _TOLD.add(channel)
        is_error = error is not None and not isinstance(error, SystemExit)
        text = f"rank {channel.rank} has ended and does not come back"
        if error is not None and is_error:
            text = f"rank {channel.rank} raised {describe_error(error)}, and has ended"
        with contextlib.suppress(RuntimeError):
            channel.post(text, gone=True, is_error=is_error)


def _channels() -> list[Channel]:
    """Of all groups that have one; of the default group, before the first call."""
    if not (dist.is_available() and dist.is_initialized()):
        return []
    world: Any = dist.group.WORLD
    if world.size() > 1:
        channel_of(world)
    return channels()


def _is_served(store: Any) -> bool:
    """Whether the store's process still answers: a call that fails fills the log."""
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    if not isinstance(store, dist.TCPStore):
        return True
    try:
        socket.create_connection((store.host, store.port), timeout=2).close()
    except OSError:
        return False
    return True
