"""What no single field of a profile shows: it would surface far from where it was read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from ringfx.ir.kernel_table import TABLE
from ringfx.ir.strategies import STRATEGIES

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
    observed = profile.kind == "observed"
    yield from _unknown("kernels", {row.kernel for row in profile.kernels}, tuple(TABLE), observed)
    yield from _unknown("overheads", {row.strategy for row in profile.overheads}, ("local",), True)
    yield from _unknown("memory", {row.strategy for row in profile.memory}, (), True)
    if not observed:
        yield from _of_kernels(profile)


def _unknown(
    rows: str, names: Iterable[str], known: Iterable[str], or_strategies: bool
) -> Iterator[str]:
    """A row under a name that nobody looks up would be lost."""
    choices = (*known, *(STRATEGIES if or_strategies else ()))
    for name in sorted(set(names) - set(choices)):
        yield f"{rows} has a row for {name!r}, which is not one of {', '.join(choices)}"


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
