"""Dilated attention as values: its branches, and which rows of a sequence one head keeps in each.

LongNet (arXiv 2307.02486, section 3): a branch (w, r) cuts the sequence into segments of w tokens
and keeps in each every r-th row; head j starts at row j mod r of each segment. Queries attend the
kept keys of their own segment. The branches merge by the denominators of their softmaxes, so a row
has weight 0 in a branch that does not keep it. Positions are those of the whole sequence: the
result does not depend on how tokens lie on ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from pydantic import ConfigDict

from ringfx.ir.layout import Layout, LayoutKind
from ringfx.ir.tiles.expr import CAUSAL, Expr, K, Q, conjunction
from ringfx.validation.fields import STRICT, Tokens

__all__ = [
    "AnyLayout", "Branch", "HeadPart", "KeptLayout", "KeptRows", "StridedRun", "describe_branches",
    "head_parts", "layout_of",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Branch:
    """Segments of so many tokens, in each of which every ``rate``-th row is kept."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    segment: Tokens
    rate: Tokens

    @property
    def segments(self) -> Expr:
        """The mask of its segments, over all rows."""
        return _same_block(self.segment)


def describe_branches(branches: Sequence[Branch]) -> str:
    """``dilated, segments 1,024 / 4,096, rates 1 / 4``."""
    segments = " / ".join(f"{branch.segment:,}" for branch in branches)
    return f"dilated, segments {segments}, rates {' / '.join(str(b.rate) for b in branches)}"


def _same_block(size: int) -> Expr:
    return ("eq", ("floordiv", Q, ("const", size)), ("floordiv", K, ("const", size)))


@dataclass(frozen=True, kw_only=True)
class KeptRows:
    """The rows i < length of a sequence with ``i % segment % rate == offset``, numbered in order.

    >>> KeptRows(length=10, segment=4, rate=2, offset=1).positions()
    [1, 3, 5, 7, 9]
    """

    length: int
    segment: int
    rate: int
    offset: int

    @property
    def per_segment(self) -> int:
        """Kept rows of a segment that is not the last."""
        return max(0, -(-(self.segment - self.offset) // self.rate))

    def before(self, position: int) -> int:
        """How many rows are kept of those before a position."""
        position = min(position, self.length)
        segments, rest = divmod(position, self.segment)
        return segments * self.per_segment + max(0, -(-(rest - self.offset) // self.rate))

    @property
    def count(self) -> int:
        return self.before(self.length)

    def position(self, number: int) -> int:
        """Where in the sequence a kept row lies."""
        segment, place = divmod(number, self.per_segment)
        return segment * self.segment + self.offset + place * self.rate

    def positions(self) -> list[int]:
        return [self.position(number) for number in range(self.count)]

    def keep(self, *, causal: bool) -> Expr | None:
        """The mask over kept rows: equal segments, and no later keys if causal."""
        one = self.count <= self.per_segment
        segments = None if one else _same_block(self.per_segment)
        return conjunction(segments, CAUSAL if causal else None)


@dataclass(frozen=True, kw_only=True)
class StridedRun:
    """Kept rows that lie at even distances in a rank's tokens."""

    local: slice
    """Where they are among the rank's tokens."""
    place: int
    """Where the first of them is among the rank's kept rows."""
    count: int


@dataclass(frozen=True)
class KeptLayout:
    """How kept rows lie on ranks: each rank keeps those of its own tokens.

    Ranks hold equal numbers of rows; those beyond a rank's own are padding at the end.
    """

    tokens: Layout
    rows: KeptRows

    @property
    def length(self) -> int:
        return self.rows.count

    @property
    def padded_length(self) -> int:
        """All rows in order of position, without padding between or after them."""
        return self.rows.count

    @property
    def world_size(self) -> int:
        return self.tokens.world_size

    @property
    def local_length(self) -> int:
        """Rows on each rank, padding included; at least one."""
        return max(1, *map(self.count, range(self.world_size)), 0)

    def count(self, rank: int) -> int:
        """Kept rows of a rank's tokens."""
        return sum(there.stop - there.start for there, _ in self.chunks(rank))

    def chunks(self, rank: int) -> Iterator[tuple[slice, slice]]:
        """Where a rank's rows are among all kept ones, and where among its own."""
        place = 0
        for start in self.tokens.chunk_starts(rank):
            first = self.rows.before(start)
            stop = self.rows.before(start + self.tokens.chunk_length)
            if stop > first:
                yield slice(first, stop), slice(place, place + stop - first)
            place += stop - first

    def positions(self, rank: int, device: torch.device | str | None = None) -> torch.Tensor:
        """Number of each local row, int64 [local_length]; of padding ``length``."""
        found = torch.full((self.local_length,), self.length, device=device)
        for there, here in self.chunks(rank):
            found[here] = torch.arange(there.start, there.stop, device=device)
        return found

    def strided_runs(self, rank: int) -> Iterator[StridedRun]:
        """Where a rank's kept rows are among its tokens: one run a chunk where segments line up."""
        rows, size = self.rows, self.tokens.chunk_length
        starts = self.tokens.chunk_starts(rank)
        even = rows.segment % rows.rate == 0
        for (there, here), (at, start) in zip(
            self.chunks(rank), self._kept_chunks(starts), strict=True
        ):
            number = there.start
            while number < there.stop:
                end = there.stop if even else min(there.stop, _next(number, rows.per_segment))
                first = rows.position(number) - start + at * size
                count = end - number
                yield StridedRun(
                    local=slice(first, first + (count - 1) * rows.rate + 1, rows.rate),
                    place=here.start + number - there.start,
                    count=count,
                )
                number = end

    def _kept_chunks(self, starts: tuple[int, ...]) -> Iterator[tuple[int, int]]:
        for at, start in enumerate(starts):
            if self.rows.before(start + self.tokens.chunk_length) > self.rows.before(start):
                yield at, start


def _next(number: int, size: int) -> int:
    return (number // size + 1) * size


AnyLayout: TypeAlias = Layout | KeptLayout


def layout_of(
    kind: LayoutKind, length: int, world_size: int, rows: KeptRows | None = None
) -> AnyLayout:
    """How so many tokens lie on ranks, or the kept rows of a sequence."""
    if rows is None:
        return Layout(kind, length, world_size)
    return KeptLayout(Layout(kind, rows.length, world_size), rows)


@dataclass(frozen=True, kw_only=True)
class HeadPart:
    """One branch, for the heads that start at one offset."""

    rows: KeptRows
    heads: range
    kv_heads: tuple[int, ...]
    """Of each group of these heads, the K/V head that they read; one may serve several groups."""


def head_parts(
    branches: Sequence[Branch], length: int, num_heads: int, num_kv_heads: int, first_head: int = 0
) -> Iterator[HeadPart]:
    """The parts that keep any row, of heads of which the first has this number among all."""
    ratio = num_heads // num_kv_heads
    for branch in branches:
        for offset in range(branch.rate):
            rows = KeptRows(length=length, segment=branch.segment, rate=branch.rate, offset=offset)
            heads = range((offset - first_head) % branch.rate, num_heads, branch.rate)
            if heads and rows.count:
                read = [head // ratio for head in heads]
                yield HeadPart(rows=rows, heads=heads, kv_heads=_read_heads(read))


def _read_heads(read: Sequence[int]) -> tuple[int, ...]:
    """The K/V head of each query head, or of each group of them if all groups are of one size."""
    distinct = sorted(set(read))
    size = len(read) // len(distinct)
    grouped = [head for head in distinct for _ in range(size)] == list(read)
    return tuple(distinct if grouped else read)
