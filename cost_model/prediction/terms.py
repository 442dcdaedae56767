"""The terms that every strategy's time is a sum of: kernel calls, messages, copies.

With b batch, h heads, g K/V heads, head dims d (q, k) and e (v), for c calls over w pairs a head:

    kernel     c * call + b h (F w / rate + w * pair + w_masked * masked) + w_masked * mask
               F = 2 (d + e) forward: q k^T, P v
               F = 2 (3d + 2e) backward: q k^T again, dP, dV, dQ, dK
    handling   bytes of buffers that are made * handling
    merging    3 passes over the float32 rows that a call adds to, at the speed of memory; forward,
               what the merge of its output costs in launches is part of the call
    message    steps * latency + bytes / bandwidth
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from ringfx.cost_model.prediction.kernel_choice import REFERENCE, priced_as
from ringfx.cost_model.prediction.profile import Profile
from ringfx.cost_model.prediction.profile_rows import Direction, Operation
from ringfx.cost_model.prediction.work import Work
from ringfx.ir.kernel_table import Pick
from ringfx.ir.values import AttentionSite
from ringfx.ops.tiling.flops import flops_per_pair
from ringfx.ops.tiling.tile_sizes import MASKED_TILE, stored_tile

__all__ = [
    "accumulator_bytes",
    "copy_seconds",
    "handling_seconds",
    "itemsize",
    "kernel_seconds",
    "message_seconds",
    "message_steps",
]

PASSES = 3
"""Reads and writes of a row when something is added to it."""


def itemsize(site: AttentionSite) -> int:
    """Bytes of one element of q, k, v and the output."""
    dtype: torch.dtype = getattr(torch, site.dtype)
    return dtype.itemsize


def accumulator_bytes(site: AttentionSite) -> int:
    """Bytes of one element of a sum over tiles: float64 for float64, else float32."""
    return 8 if site.dtype == "float64" else 4


DROPPING = 1.25
"""What the same calls take if weights are dropped (one core with AVX512, 8 heads of 64, 1024 and
2048 tokens, forward and backward: 1.19 to 1.26)."""


def kernel_seconds(
    profile: Profile,
    pick: Pick,
    site: AttentionSite,
    work: Work,
    direction: Direction,
    head_share: float = 1.0,
) -> float:
    """Time of the kernels' calls on one rank, with what is added up between them.

    Parameters
    ----------
    head_share
        The part of all heads that this rank computes.
    """
    heads = site.batch * site.heads * head_share
    side = MASKED_TILE
    if pick.plain == REFERENCE:
        side = stored_tile(site.device, site.batch * site.heads)
        work = _in_tiles(work, side)
    calls_s = sum(
        _calls_seconds(profile, kernel, site, part, direction, heads, side)
        for kernel, part in _parts(pick, work)
    )
    if site.spec.dropout:
        calls_s *= DROPPING
    masks_s = work.masked_pairs * profile.mask_ns_per_pair / 1e9
    masks_s += work.masked_pairs / side**2 * profile.mask_us_per_tile / 1e6
    merging = copy_seconds(profile, PASSES * _merged_bytes(site, work, direction) * head_share)
    return calls_s + masks_s + merging


def _parts(pick: Pick, work: Work) -> Sequence[tuple[str, Work]]:
    """What each kernel of a direction computes."""
    if not pick.masked or not work.masked_pairs:
        return ((pick.plain, work),)
    if work.masked_pairs >= work.pairs:
        return ((pick.masked, work),)
    masked = Work(calls=work.masked_calls, pairs=work.masked_pairs, masked_pairs=work.masked_pairs)
    rest = replace(
        work,
        calls=work.calls - work.masked_calls,
        pairs=work.pairs - work.masked_pairs,
        masked_pairs=0.0,
    )
    return ((pick.plain, rest), (pick.masked, masked))


def _in_tiles(work: Work, side: int) -> Work:
    """The same work of a kernel that keeps its scores, and therefore runs in tiles."""
    return replace(
        work,
        calls=max(work.calls, work.pairs / side**2),
        q_rows=max(work.q_rows, work.pairs / side),
        k_rows=max(work.k_rows, work.pairs / side),
    )


def _calls_seconds(
    profile: Profile,
    kernel: str,
    site: AttentionSite,
    work: Work,
    direction: Direction,
    heads: float,
    side: int,
) -> float:
    """Time of one kernel's calls alone."""
    row = profile.kernel(priced_as(profile, kernel), site.dtype, direction)
    pairs, masked_pairs = work.pairs, work.masked_pairs
    if kernel == REFERENCE:
        pairs += work.causal_rows * side / 2
        masked_pairs += work.causal_rows * side
    elif work.diagonals:
        rows = work.causal_rows / work.diagonals
        pairs += work.diagonals * (diagonal_pairs(kernel, rows) - rows * (rows + 1) / 2)
    flops = flops_per_pair(site.head_dim, site.v_head_dim, direction) * pairs
    per_head = flops / (row.gflops * 1e9) + pairs * row.ns_per_pair / 1e9
    per_head += masked_pairs * row.masked_ns_per_pair / 1e9
    call_us = row.call_us + (profile.merge_us if direction == "forward" else 0.0)
    return work.calls * call_us / 1e6 + heads * per_head


BLOCKS: Mapping[str, tuple[int, int]] = {"cpu_flash": (256, 512)}
"""Queries and keys that a kernel takes at a time: of torch's CPU kernel (aten/native/cpu,
FlashAttentionKernel.cpp); of fewer than 768 queries it takes 64 or 32, but keys as many."""

OTHER_BLOCKS = (128, 128)
"""FlashAttention's CUDA kernels."""


def diagonal_pairs(kernel: str, rows: float) -> float:
    """Pairs that a causal call computes, its blocks of keys being whole.

    With r rows and blocks of a queries and c keys: for each block of queries the keys up to its
    end, rounded up to c, and at most r; for many blocks r^2 / 2 + r c / 2.
    """
    queries, keys = BLOCKS.get(kernel, OTHER_BLOCKS)
    num = math.ceil(rows / queries)
    if num > MANY_BLOCKS:
        return rows * (rows + keys) / 2
    starts = (i * queries for i in range(num))
    return sum(
        min(queries, rows - start) * min(rows, keys * math.ceil((start + queries) / keys))
        for start in starts
    )


MANY_BLOCKS = 64


def _merged_bytes(site: AttentionSite, work: Work, direction: Direction) -> float:
    if direction == "forward":
        items = site.heads * work.q_rows * site.v_head_dim
    else:
        kv_dims = site.head_dim + site.v_head_dim
        items = site.heads * work.q_rows * site.head_dim + site.kv_heads * work.k_rows * kv_dims
    return site.batch * items * accumulator_bytes(site)


def copy_seconds(profile: Profile, moved_bytes: float) -> float:
    """Time to read or write so many bytes; 0 where the profile does not know the speed."""
    speed = profile.memory_gbytes_per_s
    return 0.0 if speed is None else moved_bytes / (speed * 1e9)


def handling_seconds(profile: Profile, made_bytes: float) -> float:
    """Time that a layer's buffers cost beside its kernels, messages and merges."""
    return made_bytes * profile.handling_ns_per_byte / 1e9


def message_seconds(
    profile: Profile, operation: Operation, world_size: int, received_bytes: float
) -> float:
    """Time in which one rank receives ``received_bytes`` by that collective."""
    if world_size == 1:
        return 0.0
    row = profile.link(operation, world_size)
    latency_s = message_steps(operation, world_size) * row.latency_us / 1e6
    return latency_s + received_bytes / (row.gbytes_per_s * 1e9)


def message_steps(operation: Operation, world_size: int) -> int:
    """Latencies that follow each other.

    An all-gather and a reduce-scatter go round a ring of p - 1 steps, an all-reduce is both; a send
    has one step, and so has an all-to-all, whose pairs all exchange at once.
    """
    ring = world_size - 1
    return {"send_recv": 1, "all_to_all": 1, "all_reduce": 2 * ring}.get(operation, ring)
