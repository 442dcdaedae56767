"""How much of a long list of cases runs: ``make test`` one in so many, ``make test-all`` all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

__all__ = ["one_in", "take_all"]

T = TypeVar("T")

_all = False


def take_all() -> None:
    """From here on ``one_in`` leaves nothing out: pytest's option ``--all``."""
    global _all
    _all = True


def one_in(number: int, cases: Iterable[T]) -> list[T]:
    """The first of each ``number`` cases, in their order."""
    return list(cases)[:: 1 if _all else number]
