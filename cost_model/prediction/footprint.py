"""What an attention holds while it runs: its kernel calls, its sums, its end.

q, kv, o: elements of a rank's queries, of its keys and values together, of its output; r: rows of
the output over all heads; e bytes of an element, a of a sum (float32); p ranks; N groups of heads.
A *call* is what the largest kernel call adds: its results, casts, mask.

What a strategy holds beside stands with it, in ``ringfx/strategies``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from ringfx.cost_model.prediction.profile_rows import Direction
from ringfx.cost_model.prediction.rank_share import Local
from ringfx.cost_model.prediction.terms import BLOCKS
from ringfx.cost_model.prediction.work import Work
from ringfx.ops.kernels.kernel import computed_in

__all__ = [
    "Calls", "gradient_moments", "output_moments", "sums_backward", "sums_forward",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Calls:
    """What the calls of one layer in one direction add, at most."""

    local: Local
    direction: Direction
    math: bool

    def of(self, works: Iterable[Work], head_share: float) -> int:
        """Bytes of the largest call over a share of a rank's heads."""
        if self.math:
            return self._stored(head_share)
        return round(max(self._of(work, head_share) for work in works))

    def _of(self, work: Work, head_share: float) -> float:
        site, d, e = self.local.site, self.local.site.head_dim, self.local.site.v_head_dim
        q_rows = site.batch * site.heads * head_share * work.most_queries
        k_rows = site.batch * site.kv_heads * head_share * work.most_keys
        dtype: torch.dtype = getattr(torch, site.dtype)
        backward, kv = self.direction == "backward", k_rows * (d + e)
        made = computed_in(dtype, site.device, backward=backward)
        given = q_rows * (d + 2 * e if backward else d) + kv
        results = q_rows * d + kv if backward else q_rows * e
        # By tokens, of which torch's backward makes a copy: of some heads, the rest lie between.
        in_part = head_share < 1 and site.heads * head_share > 1
        by_tokens = q_rows * e if backward and in_part else 0
        casts = 0 if made == dtype else given
        block = (1 + backward) * _block(work) * self.local.accumulator_bytes
        lse, masks = q_rows * self.local.accumulator_bytes, work.most_masked * MASK_BYTES
        inside = (by_tokens + casts) * made.itemsize + masks + block
        if made.itemsize < self.local.accumulator_bytes and site.device == "cpu" and not backward:
            inside += self._packed(work, head_share, made.itemsize)
        added = self._widened(made, max(q_rows * d, k_rows * max(d, e))) if backward else 0
        return results * made.itemsize + lse + max(inside, added)

    def _packed(self, work: Work, head_share: float, size: int) -> float:
        """What a CPU's matrix units add to a forward in half precision: K and V packed for each
        head, the weights of a block, sums of its rows, and a block of K turned round."""
        site, d, e = self.local.site, self.local.site.head_dim, self.local.site.v_head_dim
        heads = site.batch * site.heads * head_share
        queries, keys = BLOCKS["cpu_flash"]
        rows = next((least for most, least in FEWER_ROWS if work.most_queries < most), queries)
        sums = rows * (e + 2) * self.local.accumulator_bytes
        packed = heads * work.most_keys * (d + e) + min(work.most_keys, keys) * d
        return (packed + _block(work)) * size + sums

    def _widened(self, made: torch.dtype, items: float) -> float:
        """A gradient that is added to a wider sum: a CPU makes a wide copy first."""
        sums = self.local.accumulator_bytes
        return items * sums if made.itemsize < sums and self.local.site.device == "cpu" else 0

    def _stored(self, head_share: float) -> int:
        side = self.local.stored_tile
        sides = min(side, self.local.q_len) * min(side, self.local.kv_len)
        heads = self.local.site.batch * self.local.site.heads * head_share
        tiles = STORED_TILES[self.direction] + (DROPPED if self.local.site.spec.dropout else 0)
        return round(tiles * heads * sides * self.local.accumulator_bytes)


def _block(work: Work) -> int:
    """Pairs whose scores torch's CPU kernel holds: FlashAttentionKernel.cpp; a GPU's hold fewer."""
    queries, keys = BLOCKS["cpu_flash"]
    rows = next((size for least, size in FEWER_ROWS if work.most_queries < least), queries)
    return rows * min(work.most_keys, keys)


FEWER_ROWS = ((192, 32), (768, 64))
"""Below so many queries a block has so few."""
STORED_TILES: Mapping[Direction, int] = {"forward": 2, "backward": 3}
"""Tiles that the math kernel holds at once: scores and what is made of them; P, dP, a copy."""
DROPPED = 1
"""Tile of what is kept under dropout."""
MASK_BYTES = 5
"""Of a pair whose mask is evaluated: a float32 and a bool, for all heads together."""


def sums_forward(local: Local) -> int:
    """Bytes of the output and its logsumexp: (o + r) a."""
    return (local.out_items + local.rows) * local.accumulator_bytes


def sums_backward(local: Local) -> int:
    """Bytes of the sums of gradients: (q + kv) a."""
    return (local.q_items + local.kv_items) * local.accumulator_bytes


def output_moments(local: Local, kept: int = 0) -> Iterator[int]:
    """The end: the sums, and the output in its own dtype, a token's heads together."""
    yield sums_forward(local) + kept + local.out_items * local.itemsize


def gradient_moments(local: Local, kept: int = 0, own: bool = True) -> Iterator[int]:
    """The end: the sums, and gradients in their dtype where that is another or memory is shared."""
    items = local.q_items + local.kv_items
    if local.itemsize == local.accumulator_bytes:
        items = 0 if own else local.kv_items
    yield sums_backward(local) + kept + items * local.itemsize
