"""How the tokens of one sequence are laid out over the ranks.

A layout is a property of a token axis, not of a tensor. Every rank holds the same number of tokens;
positions at or beyond ``length`` are padding: they hold finite garbage, keys there are masked,
sums skip them, and gathering crops them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

__all__ = ["Layout", "LayoutKind"]

LayoutKind = Literal["contiguous", "zigzag"]


@dataclass(frozen=True)
class Layout:
    """The split of ``length`` tokens over ``world_size`` ranks.

    contiguous: rank r holds tokens [r*n, (r+1)*n).
    zigzag: of 2p equal chunks rank r holds chunks r and 2p-1-r, which balances causal attention
    (Striped/zigzag ring attention: rows early in the sequence attend little, late rows much).

    >>> Layout("zigzag", 8, 2).positions(0).tolist()
    [0, 1, 6, 7]
    >>> Layout("contiguous", 5, 2).positions(1).tolist()
    [3, 4, 5]
    """

    kind: LayoutKind
    length: int
    world_size: int

    def __post_init__(self) -> None:
        assert self.kind in ("contiguous", "zigzag"), f"unknown layout {self.kind!r}"
        assert self.length > 0, self.length
        assert self.world_size > 0, self.world_size

    @property
    def chunks_per_rank(self) -> int:
        return 2 if self.kind == "zigzag" else 1

    @property
    def chunk_length(self) -> int:
        """Tokens in one contiguous run of positions."""
        chunks = self.chunks_per_rank * self.world_size
        return -(-self.length // chunks)

    @property
    def local_length(self) -> int:
        """Tokens on each rank, padding included; equal on all ranks."""
        return self.chunks_per_rank * self.chunk_length

    @property
    def padded_length(self) -> int:
        return self.local_length * self.world_size

    @property
    def is_padded(self) -> bool:
        return self.padded_length != self.length

    def chunk_starts(self, rank: int) -> tuple[int, ...]:
        """Global position at which each contiguous run of a rank starts."""
        if self.kind == "contiguous":
            return (rank * self.chunk_length,)
        return (rank * self.chunk_length, (2 * self.world_size - 1 - rank) * self.chunk_length)

    def chunks(self, rank: int) -> Iterator[tuple[slice, slice]]:
        """Where a rank's runs are in order of position, and where among its own tokens.

        >>> list(Layout("zigzag", 8, 2).chunks(1))
        [(slice(2, 4, None), slice(0, 2, None)), (slice(4, 6, None), slice(2, 4, None))]
        """
        size = self.chunk_length
        for i, start in enumerate(self.chunk_starts(rank)):
            yield slice(start, start + size), slice(i * size, (i + 1) * size)

    def positions(self, rank: int, device: torch.device | str | None = None) -> torch.Tensor:
        """Global position of each local token, int64 [local_length]; padding is >= length."""
        runs = [
            torch.arange(start, start + self.chunk_length, device=device)
            for start in self.chunk_starts(rank)
        ]
        return torch.cat(runs)

    def order(self, device: torch.device | str | None = None) -> torch.Tensor:
        """Index that sorts the ranks' concatenated tokens by position, int64 [length]."""
        positions = torch.arange(self.length, device=device)
        if self.kind == "contiguous":
            return positions
        # Chunk c of 2p is the first of rank c, or the second of rank 2p-1-c.
        size, ranks = self.chunk_length, self.world_size
        chunk = positions // size
        is_second = chunk >= ranks
        rank = torch.where(is_second, 2 * ranks - 1 - chunk, chunk)
        return rank * self.local_length + is_second * size + positions % size
