"""Programs that are looked at while they run: an observer runs them in place of the compiler."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Protocol

from ringfx.comm.world import World
from ringfx.compile.compilers import Compiled
from ringfx.compile.pipeline import Lowered

__all__ = ["Observer", "observer", "observing"]


class Observer(Protocol):
    """Runs each local program itself, uncompiled."""

    def runs(self, lowered: Lowered, world: World) -> Compiled:
        """What is called in place of the compiled program, with the same inputs."""


_OBSERVER: ContextVar[Observer | None] = ContextVar("ringfx_observer", default=None)


def observer() -> Observer | None:
    """The one that programs which are compiled now are given to."""
    return _OBSERVER.get()


@contextlib.contextmanager
def observing(by: Observer) -> Iterator[None]:
    """Inside, programs are given to an observer instead of a compiler."""
    token = _OBSERVER.set(by)
    try:
        yield
    finally:
        _OBSERVER.reset(token)
