"""Bytes that an attention holds only while it runs, from the buffers that ``ringfx/ops`` makes.

q, kv, o: elements of a rank's queries, of its keys and values together, of its output; r: rows of
the output over all heads; e bytes of an element, a of a sum (float32); p ranks; c copies of K/V
heads; N groups of heads. The larger of forward and backward counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import lcm

from ringfx.cost_model.local import Local
from ringfx.cost_model.profile import Direction
from ringfx.cost_model.terms import stored_tile

__all__ = ["made_bytes", "workspace_bytes"]

STORED_TILES = 3
"""Tiles of scores that the math kernel holds at once, backward: P, dP and a copy."""


def workspace_bytes(local: Local, strategy: str) -> int:
    """Bytes beyond q, k, v, the output, its logsumexp and the gradients that are handed over."""
    forward, backward = FOOTPRINTS[strategy if local.world_size > 1 else "local"]
    tiles = _stored_tiles(local) if strategy == "simple" or local.site.spec.soft_cap else 0
    return tiles + max(forward(local), backward(local) if local.site.trains else 0)


def made_bytes(local: Local, strategy: str, direction: Direction) -> int:
    """Bytes of buffers and results that one direction makes, tiles of scores apart."""
    forward, backward = FOOTPRINTS[strategy if local.world_size > 1 else "local"]
    if direction == "forward":
        return forward(local) + local.out_items * local.itemsize
    return backward(local) + (local.q_items + local.kv_items) * local.itemsize


def _stored_tiles(local: Local) -> int:
    side = stored_tile(local.site)
    sides = min(side, local.q_len) * min(side, local.kv_len)
    heads = local.site.batch * local.site.heads
    return STORED_TILES * heads * sides * local.accumulator_bytes


def _output(local: Local, groups: int = 1) -> int:
    """The running output o a + r a, and the kernel's own result of a tile, (o e + r a) / N."""
    out, rows = local.out_items, local.rows
    kernel = (rows * local.accumulator_bytes + out * local.itemsize) // groups
    return (out + rows) * local.accumulator_bytes + kernel


def _simple_forward(local: Local) -> int:
    """2 kv e: the block at hand and the one that arrives; and the output."""
    return 2 * local.kv_items * local.itemsize + _output(local)


def _simple_backward(local: Local) -> int:
    """2 kv e + (q + kv) a for the sums + 2 kv a: gradients packed and arriving."""
    kv, a = local.kv_items, local.accumulator_bytes
    return 2 * kv * local.itemsize + (local.q_items + 3 * kv) * a


def _production_forward(local: Local) -> int:
    """min(5, 3 N)/N kv e: two groups' blocks at hand, on their way, and one packed; the output.

    Between two ranks nothing is passed on: min(4, 2 N)/N kv e, sent and received.
    """
    groups = local.ring_groups
    return _passing(local, groups) + _output(local, groups)


def _production_backward(local: Local) -> int:
    """min(5, 3 N)/N kv e + (q + kv) a for the sums + min(4, 3 N)/N kv a for shares of gradients.

    Between two ranks a share is made when its block is done with, in that block's buffers where
    they are as large: min(4, 2 N)/N kv (e, and a unless e = a).
    """
    groups, kv = local.ring_groups, local.kv_items
    shares = min(4, 3 * groups) * kv // groups
    if local.world_size == 2:
        own = local.itemsize != local.accumulator_bytes
        shares = min(4, 2 * groups) * kv // groups if own else 0
    kernel = (local.q_items + kv) // groups * local.itemsize
    return (
        _passing(local, groups) + kernel + (local.q_items + kv + shares) * local.accumulator_bytes
    )


def _passing(local: Local, groups: int) -> int:
    blocks = min(4, 2 * groups) if local.world_size == 2 else min(5, 3 * groups)
    return blocks * local.kv_items // groups * local.itemsize


def _collective_forward(local: Local) -> int:
    """(2p + 1) kv e / N: own block packed, all blocks as they arrive, and in order; the output."""
    gathered = (2 * local.world_size + 1) * local.kv_items * local.itemsize
    return gathered // local.gathered_groups + _output(local)


def _collective_backward(local: Local) -> int:
    """(q + kv) a + p kv (e + 3a) / N: K, V; dK, dV whole, cut for each rank, and stacked."""
    whole = local.world_size * local.kv_items // local.gathered_groups
    sums = (local.q_items + local.kv_items) * local.accumulator_bytes
    return sums + whole * (local.itemsize + 3 * local.accumulator_bytes)


def _copies(local: Local) -> int:
    return lcm(local.site.kv_heads, local.world_size) // local.site.kv_heads


def _ulysses_forward(local: Local) -> int:
    """(q + c kv) e by heads, o a, and 3 (o + r) a while the output goes back."""
    by_heads = (local.q_items + _copies(local) * local.kv_items) * local.itemsize
    back = 3 * (local.out_items + local.rows) + local.out_items
    return by_heads + back * local.accumulator_bytes


def _ulysses_backward(local: Local) -> int:
    """(q + 2 o + c kv) e by heads, (q + c kv) a for the sums, 2 q a while they go back."""
    kv = _copies(local) * local.kv_items
    by_heads = (local.q_items + 2 * local.out_items + kv) * local.itemsize
    return by_heads + (3 * local.q_items + kv) * local.accumulator_bytes


def _local_backward(local: Local) -> int:
    """(q + kv) a for the sums, and the kernel's own gradients (q + kv) e."""
    items = local.q_items + local.kv_items
    return items * (local.accumulator_bytes + local.itemsize)


FOOTPRINTS: Mapping[str, tuple[Callable[[Local], int], Callable[[Local], int]]] = {
    #              forward              backward
    "simple": (_simple_forward, _simple_backward),
    "collective": (_collective_forward, _collective_backward),
    "production": (_production_forward, _production_backward),
    "ulysses": (_ulysses_forward, _ulysses_backward),
    "local": (_output, _local_backward),
}
