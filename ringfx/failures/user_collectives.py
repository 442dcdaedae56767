"""Where this process waits in a collective of the user's own, which ringfx does not see."""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

__all__ = ["Outside", "main_thread_at", "where_outside"]

_MODULES = ("torch.distributed.distributed_c10d", "torch.distributed.c10d_logger", "contextlib")

_FOR_ALL = frozenset({"barrier", "monitored_barrier", "all_gather_object"})
"""Over as soon as every rank has come: others may leave one rank behind while data travel."""


@dataclass(frozen=True, kw_only=True)
class Outside:
    """A function of torch.distributed that the main thread is in, and the ranks it holds."""

    number: int
    what: str
    holds: list[int]
    """Ranks of the whole world; empty where it may end without some of them."""


def main_thread_at() -> tuple[int, int]:
    """The instruction that the main thread is at."""
    frame = _main_frame()
    return (0, 0) if frame is None else (id(frame), frame.f_lasti)


def where_outside() -> Outside | None:
    """Of the main thread; None where it is elsewhere."""
    frame, inner = _main_frame(), None
    while frame is not None and frame.f_globals.get("__name__") in _MODULES:
        inner, frame = frame if _is_collective(frame) else inner, frame.f_back
    if inner is None or frame is None:
        return None
    name = inner.f_code.co_name
    place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}, in {frame.f_code.co_name}"
    return Outside(
        number=-id(inner) - inner.f_lasti,
        what=f"torch.distributed.{name} at {place}",
        holds=_ranks(inner.f_locals.get("group")) if name in _FOR_ALL else [],
    )


def _main_frame() -> FrameType | None:
    return sys._current_frames().get(threading.main_thread().ident or 0)


def _is_collective(frame: FrameType) -> bool:
    name = frame.f_code.co_name
    return frame.f_globals.get("__name__") == _MODULES[0] and hasattr(dist, name)


def _ranks(group: Any) -> list[int]:
    try:
        return dist.get_process_group_ranks(group)
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError):  # it ends just now
        return []
