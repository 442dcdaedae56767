"""What is done when a tile does not fit: halve it and try again.

Only the local tile changes, so no message does and no other rank notices. Nothing is merged before
a tile is complete, so a failed try leaves no trace in the result.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from ringfx.errors import OutOfMemory
from ringfx.ops.tiling.attention_call import Problem
from ringfx.ops.tiling.pieces import Piece, Tiling

__all__ = ["SMALLEST_TILE", "is_out_of_memory", "smaller", "tried"]

T = TypeVar("T")
log = logging.getLogger("ringfx")

SMALLEST_TILE = 16
"""Tokens on a side below which halving would free less than a kernel's own scratch memory."""
CPU_TEXTS = ("can't allocate memory", "not enough memory", "DefaultCPUAllocator")


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in CPU_TEXTS)


def tried(work: Callable[[], T]) -> T | None:
    """The work's result, or None if memory ran out."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # Outside the handler: the traceback held the failed try's tensors alive.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def smaller(problem: Problem, piece: Piece, batch: int, heads: int) -> Tiling:
    """The tiling for the parts of a piece that did not fit.

    Raises
    ------
    OutOfMemory
        If the piece is as small as pieces get.
    """
    side = max(piece.q.length, piece.k.length)
    half = 1 << max(0, (side - 1).bit_length() - 1)
    if half < SMALLEST_TILE:
        spec, ranks = problem.spec, problem.ranks
        raise OutOfMemory(
            f"{ranks.layer or 'attention'}: rank {ranks.rank} has no memory left for a tile of "
            f"{piece.q.length} queries x {piece.k.length} keys ({batch} batch, {heads} heads, "
            f"kernel {problem.kernel.name}); tiles were halved down to it. What is held besides "
            f"grows with the tokens on a rank, {problem.q_layout.local_length} of {spec.q_len} "
            f"over {ranks.size} ranks. Do: use more ranks, a shorter sequence or a smaller batch."
        )
    if problem.stats.retries == 0:
        log.warning(
            "%s: a tile of %d queries x %d keys did not fit in memory and is halved",
            problem.ranks.layer or "attention",
            piece.q.length,
            piece.k.length,
        )
    problem.stats.retries += 1
    return Tiling(masked=min(half, problem.tiling.masked), plain=half)
