"""A choice under a budget: what it takes over other numbers of ranks and at other lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, TypeAlias

from ringfx.cost_model.choice.budget import Menu
from ringfx.cost_model.choice.fits import Fitting, last_that_fits, longest
from ringfx.cost_model.choice.layers_again import Offload, Recompute
from ringfx.cost_model.prediction.rank_share import local_share
from ringfx.errors import RingfxError
from ringfx.ir.memory_plan import MemoryTimeline
from ringfx.ir.memory_timeline import in_order, least_peak
from ringfx.ir.values import AttentionSite

__all__ = [
    "MAX_WORLD_SIZE", "Asked", "Problem", "excess", "longest_that_fits", "scaled_site",
    "smallest_world_size",
]  # fmt: skip

MAX_WORLD_SIZE = 4096
"""Where the search for a world size that fits ends."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Which ways to save memory a choice may take beside strategies."""

    recompute: Recompute = "auto"
    offload: Offload = "auto"
    shard_states: bool = False
    """Whether states that are whole on each rank are counted as if the ranks shared them."""


Menus: TypeAlias = Callable[[tuple[AttentionSite, ...], int], Sequence[Menu]]
"""The options of each site over so many ranks; raises StrategyRefused where there is none."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A choice that cannot be made: the model, the ranks and the budget of each."""

    sites: tuple[AttentionSite, ...]
    menus: Menus
    world_size: int
    budget: int | None
    memory: MemoryTimeline
    replicated: frozenset[int] = frozenset()
    """Sites (by their number) that run whole on every rank."""
    asked: Asked
    variant: Callable[[Asked], Problem]
    """The same with other ways to save memory."""
    knows_host: bool = False
    """Whether the profile says what offloading takes."""
    can_shard: bool = False
    """Whether states are whole, and it is known what the ranks would take if they shared them."""

    @cached_property
    def excesses(self) -> dict[tuple[int, float], float]:
        """What ``excess`` has found."""
        return {}

    @cached_property
    def _fittings(self) -> dict[tuple[int, float], Fitting]:
        """What ``at`` has made."""
        return {}

    def at(self, world_size: int, scale: float = 1.0) -> Fitting:
        """The options over so many ranks, with the sequences scaled."""
        key = world_size, scale
        if key not in self._fittings:
            sites = tuple(scaled_site(site, scale) for site in self.sites)
            menus = self.menus(sites, world_size)
            self._fittings[key] = Fitting(
                sites=sites, menus=menus, world_size=world_size, memory=self.memory
            )
        return self._fittings[key]


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """What a layer keeps under any strategy, and nothing of what it works with."""

    own_queries: bool
    saved_bytes: int
    result_bytes: int
    workspace_bytes: int = 0
    recomputed: bool = True
    attention_again: bool = True
    offloaded: bool = True
    host_result_bytes: int = 0


def bound(problem: Problem, world_size: int, scale: float = 1.0) -> int:
    """Bytes beyond the budget without any workspace of attention: ``excess`` is never below.

    No mask is looked at, so it takes no time to speak of.
    """
    assert problem.budget is not None
    sites = [scaled_site(site, scale) for site in problem.sites]
    kept: list[Any] = []
    for i, site in enumerate(sites):
        is_whole = i in problem.replicated
        local = local_share(site, 1 if is_whole else world_size)
        kept.append(
            _Kept(
                own_queries=not (is_whole or site.is_local),
                saved_bytes=local.saved_bytes,
                result_bytes=local.result_bytes,
            )
        )
    found = least_peak(
        problem.memory, in_order(problem.memory, sites, kept), world_size=world_size,
        seq_len=longest(sites),
    )  # fmt: skip
    return found - problem.budget


def excess(problem: Problem, world_size: int, scale: float = 1.0) -> float:
    """Bytes beyond the budget that the choice that needs least takes over so many ranks, with the
    sequences scaled; infinite where no strategy can run.

    Where it is too much without attention's workspace, no strategy is looked at.
    """
    known = problem.excesses
    if (world_size, scale) not in known:
        known[world_size, scale] = _excess(problem, world_size, scale)
    return known[world_size, scale]


def _excess(problem: Problem, world_size: int, scale: float) -> float:
    assert problem.budget is not None
    at_least = bound(problem, world_size, scale)
    if at_least > 0:
        return at_least
    try:
        fitting = problem.at(world_size, scale)
    except RingfxError:
        return float("inf")
    return fitting.peak(fitting.least).bytes - problem.budget


def smallest_world_size(problem: Problem) -> int | None:
    """From the first that the bound allows in growing steps, then back by halves."""
    if problem.world_size >= MAX_WORLD_SIZE or excess(problem, MAX_WORLD_SIZE) > 0:
        return None
    low = _halved(partial(bound, problem), problem.world_size, MAX_WORLD_SIZE) - 1
    high, step = max(low, problem.world_size) + 1, 1
    while excess(problem, high) > 0:
        low, high, step = high, min(high + step, MAX_WORLD_SIZE), 2 * step
    return _halved(partial(excess, problem), max(low, problem.world_size), high)


def _halved(excess: Callable[[int], float], low: int, high: int) -> int:
    """The first number that fits, between one that does not and one that does."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if excess(middle) <= 0 else (middle, high)
    return high


def longest_that_fits(problem: Problem, limit: int, step: int = 1) -> int:
    """The longest sequence up to ``limit`` that fits at this world size, others scaled alike.

    It is found to within ``step`` tokens; 0: none.
    """
    length = longest(problem.sites)

    def over(seq_len: int) -> float:
        return excess(problem, problem.world_size, seq_len / length)

    def at_least(seq_len: int) -> float:
        return bound(problem, problem.world_size, seq_len / length)

    if over(step) > 0:
        return 0
    low, high = step, min(2 * step, limit)
    while high < limit and at_least(high) <= 0:
        low, high = high, min(2 * high, limit)
    if high > low and at_least(high) > 0:
        high = last_that_fits(at_least, low, high, step)
    return high if over(high) <= 0 else last_that_fits(over, step, high, step)


def scaled_site(site: AttentionSite, scale: float) -> AttentionSite:
    """The same attention over sequences of another length."""
    spec = site.spec
    q_len, kv_len = (max(1, round(n * scale)) for n in (spec.q_len, spec.kv_len))
    return replace(site, spec=replace(spec, q_len=q_len, kv_len=kv_len))
