"""How many tokens a chunk has, and which regions run in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal, TypeAlias

from ringfx.ir.layout import Layout
from ringfx.passes.chunks.region import Region
from ringfx.passes.token_axes import Lines

__all__ = ["Chunks", "Sized", "all_sized", "sized"]

Chunks: TypeAlias = Literal["auto", "all", "none"] | int
"""Regions that run in chunks: ``auto`` those of which nothing is computed again, as losses;
``all`` also others; a number of tokens: all, in chunks of so many."""

BYTES = {"cpu": 16 * 2**20}
"""Wide values of one chunk at most, by device: below it products no longer run at full speed."""
BYTES_ELSEWHERE = 256 * 2**20
FEWEST = 64
"""Tokens of a chunk at least."""


def all_sized(
    regions: Sequence[Region], lines: Lines, device: str, chunks: Chunks
) -> tuple[Sized, ...]:
    """The regions that run in chunks."""
    made = (sized(r, lines.lines[r.line].layout, device, chunks) for r in regions)
    return tuple(x for x in made if x is not None)


@dataclass(frozen=True, kw_only=True)
class Sized:
    """A region and the length of its chunks."""

    region: Region
    tokens: int
    """Of one rank."""
    chunk: int

    @property
    def count(self) -> int:
        return ceil(self.tokens / self.chunk)

    @property
    def wide_bytes(self) -> int:
        """Of one chunk."""
        return self.chunk * self.region.width


def sized(region: Region, layout: Layout, device: str, chunks: Chunks) -> Sized | None:
    """The region with its chunks; None if it runs at once.

    Chunks are equal as far as they can be, so that few lengths are compiled.
    """
    tokens = layout.local_length
    if chunks == "none" or (chunks == "auto" and not region.is_loss and region.trains):
        return None
    if isinstance(chunks, int):
        chunk = chunks
    else:
        most = BYTES.get(device, BYTES_ELSEWHERE) // max(region.width, 1)
        count = ceil(tokens / max(most, FEWEST))
        chunk = ceil(tokens / max(count, 1))
    if chunk >= tokens:
        return None
    return Sized(region=region, tokens=tokens, chunk=chunk)
