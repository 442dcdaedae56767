"""Where the points of a curve lie, in percent of a chart's width and height."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log10
from typing import Literal

__all__ = ["Chart", "Mark", "Value", "chart"]

LEFT, RIGHT, TOP, BOTTOM = 7.0, 93.0, 18.0, 90.0
"""Between these lie all points; the rest is for their words."""


@dataclass(frozen=True, kw_only=True)
class Value:
    """What is drawn at one place of the horizontal axis."""

    at: int
    label: str
    """Of the place."""
    amount: float | None
    """None: nothing is known."""
    is_here: bool
    """Whether it is the plan itself."""
    fits: bool = True


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A point of a curve."""

    x: float
    y: float
    value: Value
    words: str
    is_end: bool
    """First or last: its words are shown where there is little room, too."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A curve over lengths or ranks, both axes logarithmic."""

    title: str
    marks: tuple[Mark, ...]
    line: str
    """The points that fit, as SVG writes them."""
    limit: float | None
    """Where a limit lies."""
    limit_words: str
    limit_side: Literal["left", "right"]
    """Where its words meet no others: at the end that lies further from it."""


def chart(
    title: str,
    values: Sequence[Value],
    words: Callable[[float], str],
    limit: float | None = None,
    limit_words: str = "",
) -> Chart:
    """``words`` says an amount; ``limit`` is drawn across where it lies among the amounts."""
    amounts = [value.amount for value in values if value.amount]
    if limit:
        amounts.append(limit)
    low, high = min(amounts, default=1.0), max(amounts, default=1.0)
    first, last = values[0].at, values[-1].at

    def height(amount: float | None) -> float:
        return TOP if not amount else _between(amount, low, high, BOTTOM, TOP)

    marks = tuple(
        Mark(
            x=_between(value.at, first, last, LEFT, RIGHT),
            y=height(value.amount),
            value=value,
            words=_words(value, words),
            is_end=value in (values[0], values[-1]),
        )
        for value in values
    )
    line = " ".join(f"{mark.x:.2f},{mark.y:.2f}" for mark in marks if mark.value.fits)
    where = height(limit) if limit else None
    ends = [abs(mark.y - (where or 0.0)) for mark in (marks[0], marks[-1])]
    return Chart(
        title=title,
        marks=marks,
        line=line,
        limit=where,
        limit_words=limit_words,
        limit_side="left" if ends[0] > ends[1] else "right",
    )


def _words(value: Value, words: Callable[[float], str]) -> str:
    if value.amount is None:
        return "no plan"
    return words(value.amount) if value.fits else f"≥ {words(value.amount)}"


def _between(value: float, low: float, high: float, start: float, stop: float) -> float:
    """Where a value lies from start to stop on a logarithmic axis."""
    if high <= low:
        return (start + stop) / 2
    share = (log10(max(value, 1e-9)) - log10(max(low, 1e-9))) / (
        log10(max(high, 1e-9)) - log10(max(low, 1e-9))
    )
    return start + (stop - start) * share
