"""A process that ends reports it to the ranks that may wait for it: with its error, or done.

What kills it at once (SIGKILL, ``os._exit``) is not reported; others see a broken connection.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing.util
import os
import socket
import sys
import time
from types import TracebackType
from typing import Any

import torch.distributed as dist

from ringfx.failures.channel import Channel, channel_of, channels, is_settled
from ringfx.failures.describe import describe_error
from ringfx.torch_compat.distributed import TCPStore

__all__ = ["register_exit_report"]

log = logging.getLogger("ringfx")

LINGER_S = 1.5
"""A rank that serves the store leaves it to the others for so long, to read why it ends."""

_HOOKED: set[int] = set()
"""Processes that report; one that was forked from another starts anew."""

_REPORTED: set[Channel] = set()


def register_exit_report() -> None:
    """From now on, whatever ends the process; once in each."""
    if os.getpid() in _HOOKED:
        return
    _HOOKED.add(os.getpid())
    multiprocessing.util.register_after_fork(_HOOKED, _tell_in_child)
    usual, process = sys.excepthook, os.getpid()

    def excepthook(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        usual(kind, error, trace)
        is_prompt = hasattr(sys, "ps1") or sys.flags.interactive  # which goes on
        if os.getpid() == process and not is_prompt:
            _tell(error)

    sys.excepthook = excepthook
    # Run by atexit, and at the end of a process that multiprocessing started.
    multiprocessing.util.Finalize(None, _leave, exitpriority=100)


def _tell_in_child(_: Any) -> None:
    """A worker of a DataLoader is no rank, though it has its parent's groups."""
    if not (dist.is_available() and dist.is_initialized()):
        register_exit_report()


def _leave() -> None:
    _tell(sys.exc_info()[1])


def _tell(error: BaseException | None) -> None:
    for channel in _channels():
        if channel in _REPORTED:
            continue
        _REPORTED.add(channel)
        with contextlib.suppress(RuntimeError):
            _tell_one(channel, error)


def _tell_one(channel: Channel, error: BaseException | None) -> None:
    is_served = _is_served(channel.store)
    cause = _cause_elsewhere(channel, error, is_served)
    if cause:
        log.error("rank %d ends because another rank failed: %s", channel.rank, cause)
    if not is_served:
        return
    text, is_error = _said(error)
    channel.post(cause or f"rank {channel.rank} {text}", gone=True, is_error=is_error)
    if is_error and _serves(channel):
        time.sleep(LINGER_S)


def _cause_elsewhere(channel: Channel, error: BaseException | None, is_served: bool) -> str:
    """Why another rank has ended, where this one fails of it in a message of the user's own."""
    is_message = isinstance(error, RuntimeError) and not is_settled(error)
    if not is_message:
        return ""
    return channel.cause_elsewhere() if is_served else channel.known_cause()


def _serves(channel: Channel) -> bool:
    """Whether the store may end with this process, and what it has posted with it."""
    return channel.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _said(error: BaseException | None) -> tuple[str, bool]:
    """In words, and whether it is an error: launchers turn one into ``sys.exit(1)``."""
    if isinstance(error, SystemExit) and error.code and isinstance(error.__context__, Exception):
        error = error.__context__
    if error is None or (isinstance(error, SystemExit) and not error.code):
        return "has ended without an error", False
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
