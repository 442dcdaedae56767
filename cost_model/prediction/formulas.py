"""What a strategy's time is made of: kernels hop by hop, messages of K and V, what hides what.

p ranks, t_h the kernel time of hop h (the slowest rank's), H hops that the mask leaves, and
m(KV), m(dKV) the messages of a rank's K and V in its dtype, of their gradients in float32.
What overlaps costs the larger of both, and what a message takes from compute while it travels:
moving a byte takes some of a core's time, whatever the link.

The formulas themselves stand with what they are of, in ``ringfx/strategies``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from ringfx.cost_model.prediction.kernel_choice import REFERENCE
from ringfx.cost_model.prediction.profile import Profile
from ringfx.cost_model.prediction.profile_rows import Direction
from ringfx.cost_model.prediction.rank_share import Local
from ringfx.cost_model.prediction.terms import kernel_seconds, message_seconds
from ringfx.cost_model.prediction.work import Work, ring_work, whole_work
from ringfx.ir.kernel_table import Pick
from ringfx.ir.values import AttentionSite
from ringfx.ops.tiling.tile_sizes import MASKED_TILE

__all__ = [
    "Hops", "Phase", "exposed_seconds", "gradient_seconds", "hop_seconds", "hop_sum", "kv_seconds",
    "whole_seconds", "work_seconds",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Seconds of one direction on one rank; ``exposed_s`` is communication nothing hides."""

    compute_s: float = 0.0
    communication_s: float = 0.0
    exposed_s: float = 0.0

    @property
    def total_s(self) -> float:
        return self.compute_s + self.exposed_s

    def times(self, number: int) -> Phase:
        """So many, one after the other."""
        return Phase(
            compute_s=number * self.compute_s,
            communication_s=number * self.communication_s,
            exposed_s=number * self.exposed_s,
        )

    def __add__(self, other: Phase) -> Phase:
        return Phase(
            compute_s=self.compute_s + other.compute_s,
            communication_s=self.communication_s + other.communication_s,
            exposed_s=self.exposed_s + other.exposed_s,
        )


Hops: TypeAlias = list[tuple[float, int]]
"""Seconds of a hop, and how many hops, one after the other, take so long."""


def hop_sum(hops: Iterable[tuple[float, int]]) -> float:
    """Seconds of all hops."""
    return sum(hop_s * times for hop_s, times in hops)


def hop_seconds(
    local: Local,
    profile: Profile,
    pick: Pick,
    direction: Direction,
    *,
    groups: int = 1,
) -> Hops:
    """The slowest rank's kernel time of each hop that the mask leaves."""
    tile = local.stored_tile if pick.plain == REFERENCE else MASKED_TILE
    table = ring_work(local.site.spec, local.layout, local.world_size, tile, local.kept)
    slowest = (
        max(work_seconds(profile, pick, local.site, work, direction, groups) for work in column)
        for column in zip(*table.rows, strict=True)
    )
    return list(zip(slowest, table.times, strict=True))


def whole_seconds(
    local: Local, profile: Profile, pick: Pick, direction: Direction, head_share: float = 1.0
) -> float:
    """Kernel time of whole sequences on one rank, of all heads or a share of them."""
    return sum(
        times
        * kernel_seconds(
            profile, pick, part.site, whole_work(part.site.spec), direction, head_share
        )
        for times, part in local.parts
    )


def work_seconds(
    profile: Profile,
    pick: Pick,
    site: AttentionSite,
    work: Work,
    direction: Direction,
    groups: int,
) -> float:
    """Kernel time with the heads in groups: as many calls as groups, each on its share."""
    if not work.calls:
        return 0.0
    return groups * kernel_seconds(profile, pick, site, work, direction, 1 / groups)


def kv_seconds(local: Local, profile: Profile, groups: int = 1) -> float:
    """All groups' K and V to the next rank."""
    size = local.kv_bytes / groups
    return groups * message_seconds(profile, "send_recv", local.world_size, size)


def gradient_seconds(local: Local, profile: Profile, groups: int = 1) -> float:
    """All groups' dK and dV to another rank."""
    size = local.gradient_bytes / groups
    return groups * message_seconds(profile, "send_recv", local.world_size, size)


def exposed_seconds(profile: Profile, compute_s: float, message_s: float, sent_bytes: int) -> float:
    """What of a message does not hide: the excess over compute, and what it takes from compute."""
    lost_s = sent_bytes * profile.contention_ns_per_byte / 1e9
    return max(0.0, message_s - compute_s) + min(lost_s, message_s, compute_s)
