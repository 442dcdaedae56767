"""Heads in groups: a ring or a gather of each group is independent of the others'.

Working group by group keeps messages and temporaries small and lets the message of one group travel
while another is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

__all__ = ["MOST_GROUPS", "RING_GROUPS", "HeadGroup", "head_groups", "ring_bytes"]

GROUP_BYTES: Mapping[str, tuple[int, int]] = {"cpu": (8 << 20, 1 << 20)}
"""A group's K and V on one rank, between two ranks and in a longer ring: gloo reaches its full
bandwidth at 0.5 to 2 MiB a message, and each message wakes a thread that takes the core from the
tiles."""
GROUP_BYTES_ELSEWHERE = (256 << 20, 64 << 20)
"""A GPU's kernel needs many heads at once to fill the device."""
MOST_GROUPS = 8
RING_GROUPS = 4
"""With 2 groups a forward of 4096 tokens on two cores took 1.00, with 4 groups 1.09, with 8 groups
1.34 of the time without messages; with 4 groups it holds half as much as with 2."""


@dataclass(frozen=True)
class HeadGroup:
    """Some key/value heads and the query heads that attend them."""

    kv: slice
    q: slice

    @property
    def first_head(self) -> int:
        first: int = self.q.start
        return first


def ring_bytes(device: torch.device, size: int) -> int:
    """How many bytes of K and V a ring of ``size`` ranks moves at once, at least.

    Between two ranks a block makes a single hop, and a group holds half as much as in a longer
    ring (a receiving buffer is never sent from) while its messages have less to hide behind. With
    4, 8, 16 MiB a causal forward of 8192 tokens took 1.062, 1.040, 1.037 of the time without
    messages (2 cores, float32, 8 heads of 64). In a longer ring memory decides: at eight ranks the
    same tokens held 29.7 MB a rank with groups of 2 MiB, 19.7 MB with 1 MiB.
    """
    between_two, longer = GROUP_BYTES.get(device.type, GROUP_BYTES_ELSEWHERE)
    return between_two if size == 2 else longer


def head_groups(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKE: torch.Tensor,
    *,
    least_bytes: int,
    most: int = MOST_GROUPS,
    threads: int = 1,
    asked: int = 0,
) -> tuple[HeadGroup, ...]:
    """At most ``most`` groups of equal size, with at least so many bytes of K and V each.

    Only what is equal on all ranks decides, and so all ranks cut alike.

    Parameters
    ----------
    threads
        What the ranks agreed on: torch's CPU kernel gives each thread a (batch, head) pair in its
        backward, so a group with fewer pairs than threads would leave some idle.
    asked
        So many groups, or the most below that K/V heads can be parted into, whatever their bytes;
        0: as above.
    """
    heads, kv_heads = q_BHQD.shape[1], k_BGKD.shape[1]
    moved = (k_BGKD.numel() + v_BGKE.numel()) * k_BGKD.element_size()
    pairs = q_BHQD.shape[0] * heads
    enough = moved // max(1, least_bytes)
    most = min(asked, kv_heads) or min(enough, most, kv_heads, pairs // threads)
    count = max(1, most)
    while kv_heads % count:
        count -= 1
    size, ratio = kv_heads // count, heads // kv_heads
    return tuple(
        HeadGroup(
            kv=slice(g * size, (g + 1) * size),
            q=slice(g * size * ratio, (g + 1) * size * ratio),
        )
        for g in range(count)
    )
