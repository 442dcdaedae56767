"""Which parts of a score matrix are computed, as rectangles of local rows and columns.

A rank's tokens are a few runs of consecutive positions. For a run of queries and a run of keys this
module lists the pieces worth computing: parts that the mask empties are left out, parts that it
does not touch go to a fused kernel whole, a causal diagonal goes to the kernel's own causal path,
and only what is left has its mask evaluated, in tiles of bounded size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ringfx.ir import tiles
from ringfx.ir.attention_spec import AttentionSpec
from ringfx.ir.dilation import KeptLayout
from ringfx.ir.layout import Layout
from ringfx.ir.tiles import Expr
from ringfx.ops.tiling.tile_sizes import MASKED_TILE, stored_tile

__all__ = [
    "Piece", "Run", "Tiling", "beyond_blocks", "block_size", "pieces", "runs_of", "tiling_of",
]  # fmt: skip


@dataclass(frozen=True)
class Run:
    """Consecutive positions held in consecutive places of a local tensor."""

    position: int
    """Global position of the first token."""
    offset: int
    """Its place in the local tensor."""
    length: int

    def part(self, start: int, stop: int) -> Run:
        """The tokens at global positions [start, stop)."""
        return Run(start, self.offset + start - self.position, stop - start)

    @property
    def stop(self) -> int:
        return self.position + self.length


@dataclass(frozen=True)
class Piece:
    """Queries of one run against keys of one run."""

    q: Run
    k: Run
    keep: Expr | None
    """What is left of the mask inside the piece, to be evaluated; None keeps everything."""
    causal: bool = False
    """The kernel's own causal path: both runs are the same positions."""
    parts: tuple[Piece, ...] = ()
    """Where runs that lie side by side are computed in one call: the pieces of one run each.

    ``q`` and ``k`` then say places, not positions: nothing in such a piece reads a position.
    """
    times: int = 1
    """How many like it there are, of which this one stands for the others (``Tiling.bands``)."""

    @property
    def pairs(self) -> float:
        """(query, key) pairs of one such piece; of a causal diagonal its lower half."""
        q, k = self.q.length, self.k.length
        return q * (k + 1) / 2 if self.causal else q * k


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Bounds on pieces, in tokens.

    ``masked`` bounds a piece whose mask or bias is evaluated, ``plain`` all others (None: fused
    kernels store no scores, so they may be of any size).
    """

    masked: int
    plain: int | None = None
    bands: int | None = None
    """To count and not to compute: of the bands of queries of a mask that is evaluated, so many
    are looked at, and stand for the others."""

    def halved(self) -> Tiling | None:
        """Half the size, or None if it is the smallest already."""
        if self.masked <= 16 and (self.plain is None or self.plain <= 16):
            return None
        plain = 4096 if self.plain is None else self.plain // 2
        return Tiling(masked=max(16, self.masked // 2), plain=max(16, plain))


def tiling_of(q_BHQD: torch.Tensor, stores_scores: bool) -> Tiling:
    """Tiles small enough that a kernel which keeps its scores stays within its bound."""
    if not stores_scores:
        return Tiling(masked=MASKED_TILE)
    side = stored_tile(q_BHQD.device.type, q_BHQD.shape[0] * q_BHQD.shape[1])
    return Tiling(masked=side, plain=side)


def runs_of(layout: Layout | KeptLayout, rank: int) -> tuple[Run, ...]:
    """A rank's runs without the padding, neighbouring ones joined."""
    found: list[Run] = []
    for there, here in layout.chunks(rank):
        length = min(there.stop, layout.length) - there.start
        if length <= 0:
            continue
        if found and found[-1].stop == there.start:
            found[-1] = replace(found[-1], length=found[-1].length + length)
        else:
            found.append(Run(there.start, here.start, length))
    return tuple(found)


def pieces(
    spec: AttentionSpec,
    q_runs: Sequence[Run],
    k_runs: Sequence[Run],
    tiling: Tiling,
    *,
    b: tuple[int, int],
    h: tuple[int, int],
    inputs: Sequence[torch.Tensor] | None,
) -> Iterator[Piece]:
    """The pieces of all queries against all keys, each (query, key) pair kept in exactly one.

    Parameters
    ----------
    b, h
        Ranges of the batch and head indices.
    inputs
        The captured tensors; None where only what follows from positions is wanted.
    """
    cut = _Cut(spec, tiling, b, h, inputs)
    together = cut.together(q_runs, k_runs)
    if together is not None:
        yield together
        return
    for q_run in q_runs:
        for k_run in k_runs:
            yield from cut.rectangle(q_run, k_run, tiles.terms(spec.keep))


@dataclass(frozen=True)
class _Cut:
    spec: AttentionSpec
    tiling: Tiling
    b: tuple[int, int]
    h: tuple[int, int]
    inputs: Sequence[torch.Tensor] | None

    def together(self, q_runs: Sequence[Run], k_runs: Sequence[Run]) -> Piece | None:
        """All that there is to compute as one call, if it is one rectangle or one triangle.

        Runs of ascending positions make a causal triangle also where positions are left out between
        them. So a rank's own block is one call, and so is each block that zigzag brings to it.
        """
        if self.tiling.plain is not None or self.spec.bias is not None:
            return None
        if len(q_runs) * len(k_runs) < 2 or not (_side_by_side(q_runs) and _side_by_side(k_runs)):
            return None
        found: list[Piece] = []
        for q, k in itertools.product(q_runs, k_runs):
            left = self._undecided(q, k, tiles.terms(self.spec.keep))
            if left == (tiles.CAUSAL,) and (q.position, q.length) == (k.position, k.length):
                found.append(Piece(q, k, None, causal=True))
            elif left == ():
                found.append(Piece(q, k, None))
            elif left is not None:
                return None
        return _one_call(found) if len(found) > 1 else None

    def rectangle(self, q: Run, k: Run, keep: tuple[Expr, ...]) -> Iterator[Piece]:
        left = self._undecided(q, k, keep)
        if left is None:
            return
        blocks = next((term for term in left if _block_of(term)), None)
        if blocks is not None:
            rest = tuple(term for term in left if term != blocks)
            for q_part, k_part in _same_blocks(q, k, _block_of(blocks)):
                yield from self.rectangle(q_part, k_part, rest)
        elif left == (tiles.CAUSAL,) and self.spec.bias is None:
            yield from self._causal(q, k)
        elif not left and self.spec.bias is None:
            yield from self._plain(q, k)
        else:
            yield from self._masked(q, k, left)

    def _undecided(self, q: Run, k: Run, keep: tuple[Expr, ...]) -> tuple[Expr, ...] | None:
        """The masks that matter inside the rectangle; None if one of them empties it."""
        box = tiles.Box(
            b=self.b, h=self.h, q=(q.position, q.stop), k=(k.position, k.stop),
            row=(q.offset, q.offset + q.length),
        )  # fmt: skip
        kinds = [tiles.classify(term, box, self.inputs) for term in keep]
        if "empty" in kinds:
            return None
        return tuple(t for t, kind in zip(keep, kinds, strict=True) if kind == "mixed")

    def _causal(self, q: Run, k: Run) -> Iterator[Piece]:
        """A causal rectangle: what lies below the diagonal is full, what lies on it is causal."""
        diagonal = max(q.position, k.position)
        if k.position < diagonal:
            yield from self._plain(q, k.part(k.position, diagonal))
        k = k.part(diagonal, min(k.stop, q.stop))
        for band in _split(q.part(diagonal, q.stop), self.tiling.plain):
            start, stop = band.position, min(band.stop, k.stop)
            if start > diagonal:
                yield from self._plain(band, k.part(diagonal, min(start, k.stop)))
            if start < stop:
                yield Piece(band.part(start, stop), k.part(start, stop), None, causal=True)
            if start < stop < band.stop:
                yield from self._plain(band.part(stop, band.stop), k.part(start, stop))

    def _plain(self, q: Run, k: Run) -> Iterator[Piece]:
        for q_part in _split(q, self.tiling.plain):
            for k_part in _split(k, self.tiling.plain):
                yield Piece(q_part, k_part, None)

    def _masked(self, q: Run, k: Run, keep: tuple[Expr, ...]) -> Iterator[Piece]:
        """Bands of queries; in each, keys are halved until a part is decided or small enough."""
        for band, times in _bands(q, self.tiling):
            parts = self._band(band, k, keep)
            for part in _joined(parts) if self.tiling.plain is None else parts:
                yield part if times == 1 else replace(part, times=times)

    def _band(self, q: Run, k: Run, keep: tuple[Expr, ...]) -> Iterator[Piece]:
        left = self._undecided(q, k, keep)
        if left is None:
            return
        size = self.tiling.masked
        aligned = left == (tiles.CAUSAL,) and q.position == k.position and self.spec.bias is None
        if not left and self.spec.bias is None:
            yield from self._plain(q, k)
        elif aligned:
            yield from self._causal(q, k)
        elif k.position // size == (k.stop - 1) // size:
            yield Piece(q, k, tiles.conjunction(*left))
        else:
            first, last = k.position // size, (k.stop - 1) // size
            middle = (first + last + 1) // 2 * size
            yield from self._band(q, k.part(k.position, middle), left)
            yield from self._band(q, k.part(middle, k.stop), left)


def block_size(keep: Expr | None) -> int:
    """The blocks of positions within which a mask keeps every query's keys; 0 if there are none."""
    return max(map(_block_of, tiles.terms(keep)), default=0)


def beyond_blocks(keep: Expr | None) -> Expr | None:
    """What is left of a mask inside its blocks of positions."""
    return tiles.conjunction(*(term for term in tiles.terms(keep) if not _block_of(term)))


def _block_of(term: Expr) -> int:
    """n of ``q // n == k // n``: queries and keys of one block; 0 for any other mask."""
    match term:
        case ("eq", (division, ("q",), ("const", int(n))), (other, ("k",), ("const", int(m)))):
            return n if n == m and division == other and division in DIVISIONS else 0
        case _:
            return 0


DIVISIONS = ("floordiv", "truncdiv")
"""Of positions, which are not negative, both are one."""


def _same_blocks(q: Run, k: Run, size: int) -> Iterator[tuple[Run, Run]]:
    """The parts of both runs in each block of positions that both reach."""
    first = max(q.position, k.position) // size
    last = (min(q.stop, k.stop) - 1) // size
    for block in range(first, last + 1):
        start, stop = block * size, (block + 1) * size
        yield (
            q.part(max(start, q.position), min(stop, q.stop)),
            k.part(max(start, k.position), min(stop, k.stop)),
        )


def _side_by_side(runs: Sequence[Run]) -> bool:
    return all(a.offset + a.length == b.offset for a, b in itertools.pairwise(runs))


def _one_call(found: Sequence[Piece]) -> Piece | None:
    """The pieces as one, if they fill a rectangle or, with causal diagonals, a triangle."""
    q_runs, k_runs = _distinct(p.q for p in found), _distinct(p.k for p in found)
    if not (_side_by_side(q_runs) and _side_by_side(k_runs)):
        return None
    cells = [(q_runs.index(p.q), k_runs.index(p.k), p.causal) for p in found]
    rectangle = [(i, j, False) for i in range(len(q_runs)) for j in range(len(k_runs))]
    triangle = [(i, j, i == j) for i in range(len(q_runs)) for j in range(i + 1)]
    if cells not in (rectangle, triangle):
        return None
    causal = any(p.causal for p in found)
    return Piece(_joined_run(q_runs), _joined_run(k_runs), None, causal, tuple(found))


def _distinct(runs: Iterable[Run]) -> list[Run]:
    return sorted(set(runs), key=lambda run: run.offset)


def _joined_run(runs: Sequence[Run]) -> Run:
    return replace(runs[0], length=sum(run.length for run in runs))


def _split(run: Run, size: int | None) -> Iterator[Run]:
    """Parts of at most ``size`` tokens that end at multiples of it, so that diagonals line up."""
    if size is None:
        yield run
        return
    start = run.position
    while start < run.stop:
        stop = min((start // size + 1) * size, run.stop)
        yield run.part(start, stop)
        start = stop


ENDS = 2
"""Bands at each end of a run that stand for themselves alone."""


def _bands(run: Run, tiling: Tiling) -> Iterator[tuple[Run, int]]:
    """The bands that are looked at, and how many each stands for: it is the middle one of them.

    What a band computes is about even or grows about evenly from band to band.
    """
    size = tiling.masked
    first, stop = run.position // size, -(-run.stop // size)
    num = stop - first
    step = 1
    if tiling.bands is not None and num > tiling.bands:
        step = -(-(num - 2 * ENDS) // (tiling.bands - 2 * ENDS))
    starts = [*range(min(ENDS, num)), *range(ENDS, num - ENDS, step)]
    starts += range(max(ENDS, num - ENDS), num)
    for i, after in itertools.pairwise((*starts, num)):
        at = (first + i + (after - i) // 2) * size
        yield run.part(max(at, run.position), min(at + size, run.stop)), after - i


def _joined(parts: Iterable[Piece]) -> Iterator[Piece]:
    """Neighbouring full pieces of one band become one call."""
    last: Piece | None = None
    for part in parts:
        if (
            last is not None
            and _is_full(last)
            and _is_full(part)
            and last.k.stop == part.k.position
        ):
            last = replace(last, k=last.k.part(last.k.position, part.k.stop))
            continue
        if last is not None:
            yield last
        last = part
    if last is not None:
        yield last


def _is_full(piece: Piece) -> bool:
    return piece.keep is None and not piece.causal
