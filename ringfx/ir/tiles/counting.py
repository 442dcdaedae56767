"""How much of the score matrix a mask keeps, and whether equal runs of queries keep as much."""

from __future__ import annotations

import functools
import itertools

import torch

from ringfx.ir.tiles.evaluation import TileIndex, evaluate
from ringfx.ir.tiles.expr import Expr, conjunction, inputs_used, terms
from ringfx.ir.tiles.ranges import Box, classify

__all__ = ["density", "is_balanced"]

SAMPLED_ROWS = 64
LEAF = 65536
"""Keys evaluated at once when a row's kept keys are counted."""
PARTS = 8
BALANCED_WITHIN = 1.25
"""The busiest of 8 equal parts of the rows may do 25% more than the mean: zigzag costs two kernel
calls a tile instead of one, so a smaller gain than that is none."""


def density(keep: Expr | None, q_len: int, kv_len: int) -> float:
    """Share of (query, key) pairs kept, 0 to 1; terms that read captured tensors count as kept.

    Rows are sampled (64, or all of fewer), the kept keys of each are counted exactly.
    """
    return sum(_row_counts(keep, q_len, kv_len)) / (min(q_len, SAMPLED_ROWS) * kv_len)


def is_balanced(keep: Expr | None, q_len: int, kv_len: int) -> bool:
    """Whether equal runs of queries keep about as many pairs as each other (causal ones do not)."""
    counts = _row_counts(keep, q_len, kv_len)
    parts = min(PARTS, len(counts))
    edges = [len(counts) * i // parts for i in range(parts + 1)]
    work = [sum(counts[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    return max(work) <= BALANCED_WITHIN * sum(work) / len(work)


@functools.lru_cache(maxsize=64)
def _row_counts(keep: Expr | None, q_len: int, kv_len: int) -> list[int]:
    """Kept keys of each sampled row; the layers of a model share few masks."""
    mask = conjunction(*(term for term in terms(keep) if not inputs_used(term)))
    rows = min(q_len, SAMPLED_ROWS)
    queries = [(2 * i + 1) * q_len // (2 * rows) for i in range(rows)]
    return [_num_kept(mask, q, 0, kv_len) for q in queries]


def _num_kept(mask: Expr | None, q: int, start: int, stop: int) -> int:
    kind = classify(mask, Box(q=(q, q + 1), k=(start, stop)))
    if kind != "mixed":
        return stop - start if kind == "full" else 0
    if stop - start > LEAF:
        middle = (start + stop) // 2
        return _num_kept(mask, q, start, middle) + _num_kept(mask, q, middle, stop)
    assert mask is not None, "no mask is never mixed"
    zero = torch.zeros(1, dtype=torch.int64)
    index = TileIndex(b=zero, h=zero, q=zero + q, k=torch.arange(start, stop))
    kept = evaluate(mask, index, ()).to(torch.bool).expand(1, 1, 1, stop - start)
    return int(kept.sum())
