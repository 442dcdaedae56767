"""Text in columns: aligned tables, lines that are broken at a terminal's width, bars."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

__all__ = ["WIDTH", "bar", "table_lines", "wrapped"]

WIDTH = 80
"""Columns of a line: those of the narrowest terminal that people use."""


def table_lines(rows: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
    """Rows of cells in aligned columns; those in ``left`` are flush left, others right.

    >>> table_lines([("name", "ms"), ("a", "12.5"), ("long", "3")], left=(0,))
    ['name    ms', 'a     12.5', 'long     3']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def wrapped(lines: Iterable[str], indent: int = 0, hanging: int = 2) -> list[str]:
    """Lines of at most ``WIDTH`` columns; what a line continues with stands ``hanging`` further in.

    >>> wrapped(["one two " * 8 + "three"], indent=14)[1]
    '                three'
    """
    return [
        part
        for line in lines
        for part in textwrap.wrap(
            line,
            WIDTH,
            initial_indent=" " * indent,
            subsequent_indent=" " * (indent + hanging),
            break_on_hyphens=False,
            drop_whitespace=True,
        )
    ]


def bar(share: float, width: int) -> str:
    """Of eighths of a column, ``width`` columns for a share of 1; never empty.

    >>> bar(1.0, 4), bar(0.5, 4), bar(0.0, 4)
    ('████', '██', '▏')
    """
    eighths = max(1, round(share * width * 8))
    return "█" * (eighths // 8) + "▏▎▍▌▋▊▉"[eighths % 8 - 1 : eighths % 8]
