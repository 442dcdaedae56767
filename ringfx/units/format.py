"""Quantities in words: bytes, milliseconds, sets of numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

__all__ = ["format_budget", "format_bytes", "format_ms", "format_tokens", "index_set"]


def format_bytes(count: float) -> str:
    """Bytes with a binary unit and three significant digits.

    >>> format_bytes(1536), format_bytes(80 * 2**30), format_bytes(0)
    ('1.50 KiB', '80.0 GiB', '0 B')
    """
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 999.5 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f} B" if unit == "B" else f"{_three_digits(size)} {unit}"


def format_budget(count: int) -> str:
    """Memory that someone named, in their unit too: "80GB" is no round number of GiB.

    >>> format_budget(80 * 10**9), format_budget(80 * 2**30)
    ('80 GB (74.5 GiB)', '80.0 GiB')
    """
    binary = format_bytes(count)
    return binary if count % 10**9 else f"{count // 10**9:,} GB ({binary})"


def format_ms(value: float) -> str:
    """Milliseconds with three significant digits, in the unit in which they read best.

    >>> format_ms(0.0421), format_ms(12.34), format_ms(4321.0), format_ms(0.0)
    ('0.042 ms', '12.3 ms', '4.32 s', '0 ms')
    """
    if value == 0:
        return "0 ms"
    if value < 1:
        return f"{value:.3f} ms"
    if value < 999.5:
        return f"{_three_digits(value)} ms"
    return f"{_three_digits(value / 1000)} s"


def format_tokens(count: int) -> str:
    """A number of tokens as it is given and spoken: k and M are 1024 and 1024^2.

    >>> format_tokens(131072), format_tokens(2**20), format_tokens(1000)
    ('128k', '1M', '1,000')
    """
    for size, unit in ((2**20, "M"), (2**10, "k")):
        if count and count % size == 0:
            return f"{count // size:,}{unit}"
    return f"{count:,}"


def _three_digits(value: float) -> str:
    if abs(value) >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.2f}"


def index_set(indices: Sequence[int]) -> str:
    """Ascending numbers in a short form; a step other than one shows as its first two members.

    >>> index_set([0, 1, 2, 3]), index_set([0, 2, 4, 6]), index_set([1, 5]), index_set([7])
    ('{0..3}', '{0,2..6}', '{1,5}', '7')
    """
    if len(indices) == 1:
        return str(indices[0])
    return "{" + ",".join(_runs(indices)) + "}"


def _runs(indices: Sequence[int]) -> Iterator[str]:
    start = 0
    while start < len(indices):
        stop = _run_end(indices, start)
        yield _run_text(indices[start:stop])
        start = stop


def _run_end(indices: Sequence[int], start: int) -> int:
    """End of the longest arithmetic run from ``start``; with a step above 1, of four or more."""
    if start + 1 == len(indices):
        return start + 1
    step = indices[start + 1] - indices[start]
    stop = start + 2
    while stop < len(indices) and indices[stop] - indices[stop - 1] == step:
        stop += 1
    return stop if step == 1 or stop - start > 3 else start + 1


def _run_text(run: Sequence[int]) -> str:
    if len(run) == 1:
        return str(run[0])
    if len(run) == 2:
        return f"{run[0]},{run[1]}"
    if run[1] - run[0] == 1:
        return f"{run[0]}..{run[-1]}"
    return f"{run[0]},{run[1]}..{run[-1]}"
