"""How old a measurement is, in words."""

from __future__ import annotations

import datetime

__all__ = ["age_days", "age_words"]


def age_days(date: str) -> int | None:
    """Days since an ISO date; None where there is none."""
    return (datetime.date.today() - datetime.date.fromisoformat(date)).days if date else None


def age_words(date: str) -> str:
    """Such as ``of 2026-11-23, 12 days old``.

    >>> age_words("")
    'of unknown age'
    """
    days = age_days(date)
    if days is None:
        return "of unknown age"
    return f"of {date}, {days} day{'' if days == 1 else 's'} old"
