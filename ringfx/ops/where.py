"""An error of this rank in one line, for the other ranks: type, text, and where it arose."""

from __future__ import annotations

import re
import sys
import traceback
from pathlib import Path
from types import FrameType

__all__ = ["describe_error", "plain"]

LONGEST = 500


def describe_error(error: BaseException) -> str:
    """``IndexError: index out of range in self at model.py:12, in forward``."""
    error = getattr(error, "inner_exception", None) or error
    text = f"{type(error).__name__}: {plain(error)}"[:LONGEST].rstrip(": ")
    inside = [(f, line) for f, line in traceback.walk_tb(error.__traceback__) if _is_users(f)]
    frame, line = inside[-1] if inside else _caller()
    if frame is None:
        return text
    return f"{text} at {Path(frame.f_code.co_filename).name}:{line}, in {frame.f_code.co_name}"


def plain(error: BaseException) -> str:
    """Its first line, without the place in gloo's own sources that it may start with."""
    said = str(error).strip().splitlines()
    return re.sub(r"^\[[^\]]*/[^\]]*\] ", "", said[0]) if said else ""


def _caller() -> tuple[FrameType | None, int]:
    """The innermost frame of the user's that runs."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and not _is_users(frame):
        frame = frame.f_back
    return frame, frame.f_lineno if frame is not None else 0


def _is_users(frame: FrameType) -> bool:
    module = frame.f_globals.get("__name__", "").partition(".")[0]
    name = frame.f_code.co_filename
    return not name.startswith("<") and module not in ("torch", "ringfx", "contextlib")
