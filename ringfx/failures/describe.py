"""An error of this rank in one line, for the other ranks: type, text, and where it arose."""

from __future__ import annotations

import re
import sys
import traceback
from pathlib import Path
from types import FrameType

__all__ = ["call_site", "cure_after", "describe_error", "plain"]

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


def cure_after(why: str, cure: str) -> str:
    """What to do, as the end of a text with this reason; another rank's error says it already."""
    return "" if "Do: " in why else f". Do: {cure}."


def call_site() -> str:
    """Where the user calls what runs of ringfx: ``train.py:12, in main``."""
    frame: FrameType | None = sys._getframe()
    site, is_inside = None, False
    while frame is not None:
        if _module(frame) == "ringfx":
            site, is_inside = None, True
        elif is_inside and site is None and _is_users(frame):
            site = frame
        frame = frame.f_back
    if site is None:
        return "a frame that is not Python"
    return f"{Path(site.f_code.co_filename).name}:{site.f_lineno}, in {site.f_code.co_name}"


def _caller() -> tuple[FrameType | None, int]:
    """The innermost frame of the user's that runs."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and not _is_users(frame):
        frame = frame.f_back
    return frame, frame.f_lineno if frame is not None else 0


def _is_users(frame: FrameType) -> bool:
    name = frame.f_code.co_filename
    return not name.startswith("<") and _module(frame) not in ("torch", "ringfx", "contextlib")


def _module(frame: FrameType) -> str:
    name: str = frame.f_globals.get("__name__", "")
    return name.partition(".")[0]
