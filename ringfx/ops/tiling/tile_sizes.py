"""How large tiles are: what the operators cut, and what the cost model counts."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["MASKED_TILE", "stored_tile"]

MASKED_TILE = 512
"""Tokens of each side of a tile whose mask is evaluated: 1 MiB of float32 a (batch, head) pair."""

STORED_SCORES: Mapping[str, int] = {"cpu": 1 << 18}
"""Entries of a tile's scores, over batch and heads, where a kernel keeps them: 1 MiB stays in a
CPU's cache (8 heads of 64, 2048 tokens, one core: 0.25 s, and 0.33 s with 8 MiB)."""
STORED_SCORES_ELSEWHERE = 1 << 24


def stored_tile(device_type: str, pairs: int) -> int:
    """Side of the tiles of a kernel that keeps its scores.

    Parameters
    ----------
    pairs
        Batch times heads, all of which a call serves.
    """
    most = STORED_SCORES.get(device_type, STORED_SCORES_ELSEWHERE)
    side = MASKED_TILE
    while side > 32 and side * side * pairs > most:
        side //= 2
    return side
