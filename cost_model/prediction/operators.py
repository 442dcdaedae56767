"""The time of what runs outside attention: products by their work, all else by its bytes.

With f operations and b bytes of factors and results, of which a rank does its share:

    product       call + f / rate + b * byte
    other         call + b / elementwise
    both          large results, of so many bytes * fresh
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ringfx.cost_model.prediction.profile import Profile
from ringfx.cost_model.prediction.profile_rows import Direction

__all__ = ["LARGE", "PASSES", "PASSES_OF_OTHERS", "Work", "seconds"]

LARGE = 32 * 2**20
"""Bytes of a tensor above which a CPU's allocator asks the system each time (glibc's greatest
threshold, malloc/malloc.c: DEFAULT_MMAP_THRESHOLD_MAX)."""

PASSES: Mapping[str | int, int] = {
    # times that torch.optim reads or writes an array as large as the parameters in a step, by the
    # operators of its implementations without fusion (torch/optim)
    "adam": 16, "adamw": 18, "amsgrad": 20, "lion": 10, "momentum": 7, "sgd": 3, "none": 0,
}  # fmt: skip
PASSES_OF_OTHERS = 16
"""Of an optimizer of which only the bytes of its state are known: as Adam."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one operator, or a part of a fused one, does on one rank."""

    dtype: str = "float32"
    calls: float = 0.0
    flops: float = 0.0
    """Multiplications and additions of a product."""
    bytes: float = 0.0
    """Read and written."""
    fresh: float = 0.0
    """Bytes of large results."""
    is_fused: bool = False
    """Whether Inductor makes a kernel of it."""


def seconds(profile: Profile, work: Work, direction: Direction) -> float:
    """Time of one direction."""
    fresh_s = work.fresh * profile.fresh_ns_per_byte / 1e9
    if work.flops:
        return fresh_s + _product_seconds(profile, work, direction)
    fused = profile.fused_gbytes_per_s if work.is_fused else None
    speed = fused or profile.elementwise_gbytes_per_s or profile.memory_gbytes_per_s
    moved_s = 0.0 if speed is None else work.bytes / (speed * 1e9)
    return fresh_s + work.calls * profile.elementwise_us / 1e6 + moved_s


def _product_seconds(profile: Profile, work: Work, direction: Direction) -> float:
    row = profile.product(work.dtype, direction)
    calls_s = work.calls * row.call_us / 1e6 + work.flops / (row.gflops * 1e9)
    return calls_s + work.bytes * row.ns_per_byte / 1e9
