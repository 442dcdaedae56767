"""What no single field of a profile shows: it would surface far from where it was read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ringfx.ir.kernel_table import TABLE

if TYPE_CHECKING:
    from ringfx.cost_model.prediction.profile import Profile

__all__ = ["problems"]


def problems(profile: Profile) -> Iterator[str]:
    """A text for each thing that contradicts another, or that nobody would look up."""
    kernels = [(row.kernel, row.dtype, row.direction) for row in profile.kernels]
    yield from _twice("kernels", kernels)
    yield from _twice("links", [(row.operation, row.scope) for row in profile.links])
    yield from _twice("overheads", [(row.strategy, row.direction) for row in profile.overheads])
    yield from _twice("memory", [(row.strategy,) for row in profile.memory])
    if not kernels:
        yield "kernels has no row"
    if profile.kind != "observed":
        yield from _unknown(profile)
        yield from _of_kernels(profile)


def _unknown(profile: Profile) -> Iterator[str]:
    """A row under a name that nobody looks up would be lost. (Strategies may be a user's own.)"""
    for name in sorted({row.kernel for row in profile.kernels} - set(TABLE)):
        yield f"kernels has a row for {name!r}, which is not one of {', '.join(TABLE)}"


def _twice(name: str, keys: Sequence[tuple[str, ...]]) -> Iterator[str]:
    for i, key in enumerate(keys):
        if key in keys[:i]:
            yield f"{name}[{i}]: there are two rows for {', '.join(key)}"


def _of_kernels(profile: Profile) -> Iterator[str]:
    """Rows go in pairs: a layer that trains needs both directions."""
    kernels = {row.kernel for row in profile.kernels}
    if profile.fused_kernel not in kernels:
        yield f"fused_kernel is {profile.fused_kernel!r}; kernels has {', '.join(sorted(kernels))}"
    for row in profile.kernels:
        other = "backward" if row.direction == "forward" else "forward"
        if (row.kernel, row.dtype, other) not in {
            (r.kernel, r.dtype, r.direction) for r in profile.kernels
        }:
            yield f"kernels has {row.kernel}, {row.dtype}, {row.direction} and no {other}"
