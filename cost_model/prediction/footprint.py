"""Bytes that an attention holds while it runs, moment by moment, as ``ringfx/ops`` makes and frees.

q, kv, o: elements of a rank's queries, of its keys and values together, of its output; r: rows of
the output over all heads; e bytes of an element, a of a sum (float32); p ranks; c copies of K/V
heads; N groups of heads. A *call* is what the largest kernel call adds: its results, casts, mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import lcm

import torch

from ringfx.cost_model.prediction.profile import Direction
from ringfx.cost_model.prediction.rank_share import Local
from ringfx.cost_model.prediction.terms import BLOCKS, stored_tile
from ringfx.cost_model.prediction.work import Work, gathered_work, ring_work, whole_work
from ringfx.ops.kernels.kernel import computed_in
from ringfx.ops.strategies.production import TAKING_TURNS

__all__ = ["held_bytes", "workspace_bytes"]


def workspace_bytes(local: Local, strategy: str) -> int:
    """Bytes beyond q, k, v, the output, its logsumexp and the gradients that are handed over.

    Forward, the gradients' bytes are free for it as well: they come only later.
    """
    made = local.out_items * local.itemsize + local.rows * local.accumulator_bytes
    forward = held_bytes(local, strategy, "forward") - made
    if not local.site.trains:
        return max(0, forward)
    handed = (local.q_items + local.kv_items) * local.itemsize
    return max(0, forward - handed, held_bytes(local, strategy, "backward") - handed)


def held_bytes(local: Local, strategy: str, direction: Direction) -> int:
    """Bytes of buffers and results that one direction holds at most."""
    moments = FOOTPRINTS[strategy if local.world_size > 1 else "local", direction]
    math = strategy == "simple" or local.site.spec.soft_cap is not None
    return max(moments(local, _Calls(local=local, direction=direction, math=math)))


# --- a kernel call --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Calls:
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
        # By tokens, of which torch's backward makes a copy where that is another order.
        by_tokens = q_rows * e if backward and site.heads * head_share > 1 else 0
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
        side = stored_tile(self.local.site)
        sides = min(side, self.local.q_len) * min(side, self.local.kv_len)
        heads = self.local.site.batch * self.local.site.heads * head_share
        tiles = STORED_TILES[self.direction]
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
MASK_BYTES = 5
"""Of a pair whose mask is evaluated: a float32 and a bool, for all heads together."""


# --- what is held, by strategy --------------------------------------------------------------------


def _simple_forward(local: Local, calls: _Calls) -> Iterator[int]:
    """(o + r) a, with the block kv e and a call, or the block and the one that arrives."""
    yield from _output(local)
    output, block = _sums_forward(local), local.kv_items * local.itemsize
    yield output + block + calls.of((), 1)
    yield output + 2 * block


def _simple_backward(local: Local, calls: _Calls) -> Iterator[int]:
    """(q + kv) a + kv e, with a call, with the dK and dV that arrive, or the block that does."""
    block, travelling = local.kv_items * local.itemsize, local.kv_items * local.accumulator_bytes
    held = _sums_backward(local) + block
    yield held + calls.of((), 1)
    yield held + max(block, travelling)
    yield from _gradients(local, own=False)


def _production_forward(local: Local, calls: _Calls) -> Iterator[int]:
    """(o + r) a + the ring's buffers, and a call on 1/N of the heads."""
    yield from _output(local, _ring_buffers(local, calls.direction))
    buffers = _ring_buffers(local, calls.direction)
    yield _sums_forward(local) + buffers + calls.of(_ring(local), 1 / local.ring_groups)


def _production_backward(local: Local, calls: _Calls) -> Iterator[int]:
    """(q + kv) a + the ring's buffers, and a call on 1/N of the heads."""
    buffers = _ring_buffers(local, calls.direction)
    yield _sums_backward(local) + buffers + calls.of(_ring(local), 1 / local.ring_groups)
    yield from _gradients(local, kept=buffers)


def _ring_buffers(local: Local, direction: Direction) -> int:
    """Buffers that the ring's pool makes, of kv/N elements: tests/ops holds them to the schedule.

    Each of the T groups that take turns sends one block and receives one, 2 T. Backward, shares of
    dK and dV travel a hop behind, T + 1 of them, and home; where they are as large as blocks they
    take those that are free.
    """
    groups = local.ring_groups
    turns, hops = min(TAKING_TURNS, groups), _hops(local, direction)
    blocks, shares = (2 * turns if hops > 1 else 0), 0
    if direction == "backward" and hops > 1:
        if local.itemsize == local.accumulator_bytes:
            shares = 0 if hops == 2 else turns + min(hops, 4) - 2
        else:
            shares = 2 * turns + (hops > 2)
    group = local.kv_items // groups
    return group * (blocks * local.itemsize + shares * local.accumulator_bytes)


def _hops(local: Local, direction: Direction) -> int:
    """Blocks that each rank sees; all of them where rows without a key have gradients."""
    spec = local.site.spec
    may_lose_rows = spec.keep is not None and not spec.is_causal
    if direction == "backward" and spec.fully_masked == "absorbed" and may_lose_rows:
        return local.world_size
    return ring_work(spec, local.layout, local.world_size).hops


def _ring(local: Local) -> Iterator[Work]:
    table = ring_work(local.site.spec, local.layout, local.world_size)
    return (work for row in table.rows for work in row)


def _collective_forward(local: Local, calls: _Calls) -> Iterator[int]:
    """(o + r) a + p kv e / N, and the call over all keys, or what is packed and arrives."""
    yield from _output(local)
    groups = local.gathered_groups
    held = _sums_forward(local) + _gathered(local)
    yield held + calls.of(_whole_rows(local), 1 / groups)
    yield held + _arriving(local, local.itemsize)


def _collective_backward(local: Local, calls: _Calls) -> Iterator[int]:
    """(q + kv) a + p kv (e + a) / N, and the call over all keys, or the parts of dK and dV."""
    groups, a = local.gathered_groups, local.accumulator_bytes
    yield _sums_backward(local) + _gathered(local) + _arriving(local, local.itemsize)
    held = _sums_backward(local) + _gathered(local)
    held += local.world_size * local.kv_items // groups * a
    yield held + calls.of(_whole_rows(local), 1 / groups)
    yield held + local.kv_items // groups * a + _arriving(local, a)
    yield from _gradients(local)


def _gathered(local: Local) -> int:
    return local.world_size * local.kv_items // local.gathered_groups * local.itemsize


def _arriving(local: Local, size: int) -> int:
    """A part that leaves and one that comes; of collectives on a GPU, all of them."""
    parts = 2 if local.site.device == "cpu" else 1 + local.world_size
    return parts * local.kv_items // local.gathered_groups * size


def _whole_rows(local: Local) -> Iterable[Work]:
    return gathered_work(local.site.spec, local.layout, local.world_size)


def _ulysses_forward(local: Local, calls: _Calls) -> Iterator[int]:
    """(q + c kv) e by heads + (o + r) a, and the call over whole sequences or both once more."""
    by_heads = (local.q_items + _copies(local) * local.kv_items) * local.itemsize
    held = by_heads + _sums_forward(local)
    yield held + calls.of((whole_work(local.site.spec),), 1 / local.world_size)
    yield held + _sums_forward(local)


def _ulysses_backward(local: Local, calls: _Calls) -> Iterator[int]:
    """(q + 2 o + c kv) e + r a by heads + (q + c kv) a, and the call over whole sequences.

    Then (q + c kv) a by heads, as much by tokens, and what leaves and comes of dq, 2 q a / p.
    """
    kv, a = _copies(local) * local.kv_items, local.accumulator_bytes
    by_heads = (local.q_items + 2 * local.out_items + kv) * local.itemsize + local.rows * a
    sums = (local.q_items + kv) * a
    call = calls.of((whole_work(local.site.spec),), 1 / local.world_size)
    yield by_heads + sums + call
    yield 2 * sums + 2 * local.q_items * a // local.world_size


def _copies(local: Local) -> int:
    return lcm(local.site.kv_heads, local.world_size) // local.site.kv_heads


def _local_forward(local: Local, calls: _Calls) -> Iterator[int]:
    """(o + r) a and the call."""
    yield from _output(local)
    yield _sums_forward(local) + calls.of((whole_work(local.site.spec),), 1)


def _local_backward(local: Local, calls: _Calls) -> Iterator[int]:
    """(q + kv) a and the call."""
    yield _sums_backward(local) + calls.of((whole_work(local.site.spec),), 1)
    yield from _gradients(local)


def _sums_forward(local: Local) -> int:
    return (local.out_items + local.rows) * local.accumulator_bytes


def _sums_backward(local: Local) -> int:
    return (local.q_items + local.kv_items) * local.accumulator_bytes


def _output(local: Local, kept: int = 0) -> Iterator[int]:
    """The end: the sums, and the output in its own dtype where that is another."""
    cast = 0 if local.itemsize == local.accumulator_bytes else local.out_items * local.itemsize
    yield _sums_forward(local) + kept + cast


def _gradients(local: Local, kept: int = 0, own: bool = True) -> Iterator[int]:
    """The end: the sums, and gradients in their dtype where that is another or memory is shared."""
    items = local.q_items + local.kv_items
    if local.itemsize == local.accumulator_bytes:
        items = 0 if own else local.kv_items
    yield _sums_backward(local) + kept + items * local.itemsize


Moments = Callable[[Local, _Calls], Iterator[int]]

FOOTPRINTS: Mapping[tuple[str, Direction], Moments] = {
    ("simple", "forward"): _simple_forward,
    ("simple", "backward"): _simple_backward,
    ("collective", "forward"): _collective_forward,
    ("collective", "backward"): _collective_backward,
    ("production", "forward"): _production_forward,
    ("production", "backward"): _production_backward,
    ("ulysses", "forward"): _ulysses_forward,
    ("ulysses", "backward"): _ulysses_backward,
    ("local", "forward"): _local_forward,
    ("local", "backward"): _local_backward,
}
