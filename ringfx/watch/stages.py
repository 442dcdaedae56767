"""The stages that a program goes through until it runs, with their seconds.

They are written to the log (INFO), and where stderr is a terminal one line shows them as they pass.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field

from rich.console import Console

__all__ = ["preparing", "stage_done"]

log = logging.getLogger("ringfx")

Show = Callable[[str], None]


@dataclass
class _Program:
    """One program on its way."""

    name: str
    show: Show
    since: float
    done: list[tuple[str, float]] = field(default_factory=list)

    def finish(self, stage: str) -> None:
        now = time.perf_counter()
        self.done.append((stage, now - self.since))
        self.since = now
        self.show(self.text())

    def text(self) -> str:
        stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in self.done)
        return f"{self.name}: {stages or '...'}"


_NOW: ContextVar[_Program | None] = ContextVar("ringfx_program", default=None)


@contextlib.contextmanager
def preparing(name: str, *, rank: int, since: float | None = None) -> Iterator[None]:
    """Inside, ``stage_done`` belongs to the program of that name; rank 0 shows it.

    ``since``: ``time.perf_counter()`` at the beginning of its first stage, if that is over.
    """
    with _shown(name, rank) as show:
        program = _Program(name=name, show=show, since=since or time.perf_counter())
        token = _NOW.set(program)
        try:
            yield
        finally:
            _NOW.reset(token)
    log.info(program.text())


def stage_done(stage: str) -> None:
    """The stage of the program that is prepared now is over: ``captured``, ``placed``, ..."""
    program = _NOW.get()
    if program is not None:
        program.finish(stage)


@contextlib.contextmanager
def _shown(name: str, rank: int) -> Iterator[Show]:
    console = Console(stderr=True)
    if rank or not console.is_terminal or not log.isEnabledFor(logging.WARNING):
        yield lambda text: None
        return
    with console.status(f"ringfx: {name}") as status:
        yield lambda text: status.update(f"ringfx: {text}")
