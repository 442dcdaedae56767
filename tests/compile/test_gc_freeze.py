"""Garbage collection while a program is compiled."""

from __future__ import annotations

import gc

import pytest

from ringfx.compile.gc_freeze import gc_frozen


def test_what_existed_is_left_alone_until_the_end() -> None:
    gc.unfreeze()
    with gc_frozen():
        assert gc.get_freeze_count() > 1000
    assert gc.get_freeze_count() == 0


def test_an_error_thaws_it_too() -> None:
    gc.unfreeze()
    with pytest.raises(ValueError, match="a pass"), gc_frozen():
        raise ValueError("a pass")
    assert gc.get_freeze_count() == 0


def test_what_somebody_else_froze_stays_frozen() -> None:
    gc.freeze()
    try:
        with gc_frozen():
            pass
        assert gc.get_freeze_count() > 1000  # not all: other threads may let go of some
    finally:
        gc.unfreeze()
