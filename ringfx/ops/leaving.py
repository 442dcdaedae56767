"""A process that ends tells the ranks that may wait for it: with an error of the user's, or done.

What kills it at once (SIGKILL, ``os._exit``) is not told; others see a broken connection.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing.util
import os
import socket
import sys
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from ringfx.ops.channel import Channel, channel_of, channels
from ringfx.ops.where import describe_error

__all__ = ["tell_when_leaving"]

_TOLD: set[Channel] = set()


@functools.cache
def tell_when_leaving() -> None:
    """From now on, whatever ends the process; once."""
    usual, process = sys.excepthook, os.getpid()

    def excepthook(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        is_prompt = hasattr(sys, "ps1") or sys.flags.interactive  # which goes on
        if os.getpid() == process and not is_prompt:
            _tell(error)
        usual(kind, error, trace)

    sys.excepthook = excepthook
    # Run by atexit, and at the end of a process that multiprocessing started.
    multiprocessing.util.Finalize(None, _leave, exitpriority=100)


def _leave() -> None:
    _tell(sys.exc_info()[1])


def _tell(error: BaseException | None) -> None:
    text, is_error = _said(error)
    for channel in _channels():
        if channel in _TOLD or not _is_served(channel.store):
            continue
        _TOLD.add(channel)
        with contextlib.suppress(RuntimeError):
            channel.post(f"rank {channel.rank} {text}", gone=True, is_error=is_error)


def _said(error: BaseException | None) -> tuple[str, bool]:
    """In words, and whether it is an error: launchers turn one into ``sys.exit(1)``."""
    if isinstance(error, SystemExit) and error.code and isinstance(error.__context__, Exception):
        error = error.__context__
    if error is None or (isinstance(error, SystemExit) and not error.code):
        return "has ended and does not come back", False
    if isinstance(error, SystemExit):
        return f"has ended with exit code {error.code}", True
    return f"raised {describe_error(error)}, and has ended", True


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
    if not isinstance(store, TCPStore):
        return True
    try:
        socket.create_connection((store.host, store.port), timeout=2).close()
    except OSError:
        return False
    return True
