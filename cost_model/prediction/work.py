"""How much of a score matrix each rank computes, from the very pieces that the operators compute.

``ringfx.ops.tiling.pieces`` cuts a mask into what is computed; here the same pieces are counted,
for a few ranks that stand for all, once for each mask, layout and number of ranks. Nothing is
evaluated: a mask that depends on data counts as computed wherever positions do not rule it out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

from ringfx.ir.attention_spec import AttentionSpec
from ringfx.ir.dilation import KeptRows, layout_of
from ringfx.ir.layout import Layout, LayoutKind
from ringfx.ir.tiles import conjunction, inputs_used, terms
from ringfx.ops.tiling.pieces import Piece, Run, Tiling, pieces, runs_of
from ringfx.ops.tiling.tile_sizes import MASKED_TILE

__all__ = [
    "RingWork", "Work", "gathered_work", "own_keys_work", "ring_work", "some_ranks", "whole_work",
]  # fmt: skip

MOST_BANDS = 24
"""Bands of queries that are counted in a run whose mask is evaluated; they stand for all."""

FEW_RANKS = 8
"""Up to so many ranks all are counted; of more, the first, middle and last stand for the others."""

NEAR_HOPS = 8
FAR_HOPS = 24
"""Hops that are counted one by one, and how many stand for the hops beyond."""


@dataclass(frozen=True)
class Work:
    """What is computed for one (batch, head) pair."""

    calls: float = 0.0
    """Kernel calls; one serves all batch rows and heads."""
    pairs: float = 0.0
    """(query, key) pairs computed."""
    masked_pairs: float = 0.0
    """Those of them whose mask or bias is evaluated."""
    diagonals: float = 0.0
    """Calls that a causal diagonal halves."""
    causal_rows: float = 0.0
    """Query rows of those calls."""
    q_rows: float = 0.0
    """Rows of the output merged, or of dq added, over all calls."""
    k_rows: float = 0.0
    """Rows of dK and dV added, over all calls."""
    most_queries: int = 0
    """Of one call."""
    most_keys: int = 0
    most_masked: int = 0
    """Pairs of one call whose mask is evaluated."""
    masked_calls: float = 0.0
    """Of the calls those whose mask is evaluated."""

    def __add__(self, other: Work) -> Work:
        """Both one after the other: calls add up, and the largest stays the largest."""
        return Work(
            calls=self.calls + other.calls,
            pairs=self.pairs + other.pairs,
            masked_pairs=self.masked_pairs + other.masked_pairs,
            diagonals=self.diagonals + other.diagonals,
            causal_rows=self.causal_rows + other.causal_rows,
            q_rows=self.q_rows + other.q_rows,
            k_rows=self.k_rows + other.k_rows,
            most_queries=max(self.most_queries, other.most_queries),
            most_keys=max(self.most_keys, other.most_keys),
            most_masked=max(self.most_masked, other.most_masked),
            masked_calls=self.masked_calls + other.masked_calls,
        )


@dataclass(frozen=True)
class RingWork:
    """The work of each hop of a ring, for a few ranks and hops that stand for all."""

    times: tuple[int, ...]
    """How many hops, one after the other, each counted one stands for."""
    rows: tuple[tuple[Work, ...], ...]
    """For each counted rank the work of each counted hop."""

    @property
    def hops(self) -> int:
        return sum(self.times)


@lru_cache(maxsize=256)
def ring_work(
    spec: AttentionSpec,
    layout: LayoutKind,
    world_size: int,
    tile: int = MASKED_TILE,
    rows: KeptRows | None = None,
) -> RingWork:
    """For some ranks the work of each hop; hops after the last that any of them needs are left out.

    Hop t of rank r meets the keys of rank r - t. ``tile`` is the side of a tile whose mask is
    evaluated, ``rows`` which rows of a longer sequence these are. However many ranks there are, a
    bounded number of them and of hops is looked at.
    """
    counted, full_like = _positional(spec)
    starts = _counted_hops(world_size)
    table = [
        tuple(_hop(counted, full_like, tile, layout, world_size, rank, hop, rows) for hop in starts)
        for rank in some_ranks(world_size)
    ]
    last = max((i for row in table for i, work in enumerate(row) if work.pairs), default=0)
    times = (stop - start for start, stop in pairwise((*starts, world_size)))
    return RingWork(tuple(times)[: last + 1], tuple(row[: last + 1] for row in table))


def gathered_work(spec: AttentionSpec, layout: LayoutKind, world_size: int) -> tuple[Work, ...]:
    """For some ranks the work of their queries over all keys at once."""
    counted, full_like = _positional(spec)
    return tuple(
        _gathered(counted, full_like, layout, world_size, rank) for rank in some_ranks(world_size)
    )


def own_keys_work(spec: AttentionSpec, layout: LayoutKind, world_size: int) -> tuple[Work, ...]:
    """For some ranks the work of all queries over the keys that they hold."""
    counted, full_like = _positional(spec)
    return tuple(
        _own_keys(counted, full_like, layout, world_size, rank) for rank in some_ranks(world_size)
    )


def whole_work(spec: AttentionSpec) -> Work:
    """All queries over all keys: one rank, or one rank's heads."""
    return gathered_work(spec, "contiguous", 1)[0]


def _positional(spec: AttentionSpec) -> tuple[AttentionSpec, bool]:
    """The mask as far as it follows from positions, and whether data mask all that is left."""
    by_position = [term for term in terms(spec.keep) if not inputs_used(term)]
    depends_on_data = len(by_position) < len(terms(spec.keep)) or spec.bias is not None
    keep = conjunction(*by_position)
    return replace(
        spec, keep=keep, bias=None, scale=1.0, soft_cap=None, score_map=None
    ), depends_on_data


def some_ranks(world_size: int) -> Sequence[int]:
    if world_size <= FEW_RANKS:
        return range(world_size)
    middle = world_size // 2
    return 0, 1, middle - 1, middle, world_size - 2, world_size - 1


def _counted_hops(world_size: int) -> Sequence[int]:
    """Every hop, or for many ranks some, each of which stands for those up to the next."""
    far = max(1, -(-(world_size - NEAR_HOPS) // FAR_HOPS))
    return *range(min(NEAR_HOPS, world_size)), *range(NEAR_HOPS, world_size, far)


@lru_cache(maxsize=65_536)
def _hop(
    spec: AttentionSpec,
    masked: bool,
    tile: int,
    layout: LayoutKind,
    world_size: int,
    rank: int,
    hop: int,
    rows: KeptRows | None,
) -> Work:
    keys = runs_of(layout_of(layout, spec.kv_len, world_size, rows), (rank - hop) % world_size)
    queries = runs_of(layout_of(layout, spec.q_len, world_size, rows), rank)
    return _count(spec, masked, queries, keys, tile)


@lru_cache(maxsize=4096)
def _gathered(
    spec: AttentionSpec, masked: bool, layout: LayoutKind, world_size: int, rank: int
) -> Work:
    queries = runs_of(Layout(layout, spec.q_len, world_size), rank)
    return _count(spec, masked, queries, (Run(0, 0, spec.kv_len),))


@lru_cache(maxsize=4096)
def _own_keys(
    spec: AttentionSpec, masked: bool, layout: LayoutKind, world_size: int, rank: int
) -> Work:
    keys = runs_of(Layout(layout, spec.kv_len, world_size), rank)
    return _count(spec, masked, (Run(0, 0, spec.q_len),), keys)


def _count(
    spec: AttentionSpec,
    masked: bool,
    queries: Sequence[Run],
    keys: Sequence[Run],
    tile: int = MASKED_TILE,
) -> Work:
    tiling = Tiling(masked=tile, bands=MOST_BANDS)
    found = pieces(spec, queries, keys, tiling, b=(0, 1), h=(0, 1), inputs=None)
    return sum((_work(piece, masked) for piece in found), Work())


def _work(piece: Piece, masked: bool) -> Work:
    """A diagonal computes its lower half; where data mask, every tile is a call of its own."""
    q, k = piece.q.length, piece.k.length
    area = q * k
    is_masked = masked or piece.keep is not None
    most_queries, most_keys = (min(x, MASKED_TILE) if is_masked else x for x in (q, k))
    times = piece.times
    calls = times * (max(1.0, area / MASKED_TILE**2) if masked else 1.0)
    return Work(
        calls=calls,
        pairs=times * piece.pairs,
        masked_pairs=times * piece.pairs if is_masked else 0.0,
        diagonals=times if piece.causal else 0.0,
        causal_rows=times * q if piece.causal else 0.0,
        q_rows=times * q * (max(1.0, k / MASKED_TILE) if masked else 1.0),
        k_rows=times * k * (max(1.0, q / MASKED_TILE) if masked else 1.0),
        most_queries=most_queries,
        most_keys=most_keys,
        most_masked=most_queries * most_keys if is_masked else 0,
        masked_calls=calls if is_masked else 0.0,
    )
