"""When nothing fits: what the peak is made of, and the nearest thing that would."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch

from ringfx.cost_model.choice.budget import Menu
from ringfx.cost_model.choice.fits import Fitting, last_that_fits, longest
from ringfx.cost_model.peak_memory.optimizers import state_bytes
from ringfx.cost_model.prediction.rank_share import local_share
from ringfx.errors import OutOfMemory, RingfxError
from ringfx.ir.memory_plan import MemoryTimeline
from ringfx.ir.memory_timeline import (
    Peak,
    in_order,
    least_peak,
    never_below,
    outside_peak,
    whole_bytes,
)
from ringfx.ir.values import AttentionSite
from ringfx.units.format import format_bytes

__all__ = [
    "MAX_WORLD_SIZE", "Problem", "explain_infeasible", "longest_that_fits", "refuse_hopeless",
    "refuse_parameters", "scaled_site",
]  # fmt: skip

MAX_WORLD_SIZE = 4096
"""Where the search for a world size that fits ends."""

Menus: TypeAlias = Callable[[Sequence[AttentionSite], int], Sequence[Menu]]
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

    def at(self, world_size: int, scale: float = 1.0) -> Fitting:
        """The options over so many ranks, with the sequences scaled."""
        sites = [scaled_site(site, scale) for site in self.sites]
        menus = self.menus(sites, world_size)
        return Fitting(sites=sites, menus=menus, world_size=world_size, memory=self.memory)


def refuse_parameters(
    parameters: Iterable[torch.Tensor],
    budget: int | None,
    optimizer: str | int = "none",
    trained: Callable[[], Collection[torch.Tensor]] = tuple,
) -> None:
    """Before the model is traced: what each rank holds of its parameters is too much alone.

    Parameters
    ----------
    trained
        Finds the parameters that get gradients; asked only where that may decide.

    Raises
    ------
    OutOfMemory
        The parameters are, or they and their gradients and optimiser state.
    """
    if budget is None:
        return
    parameters = list(parameters)
    size = _bytes(parameters)
    if size > budget:
        raise OutOfMemory(_hopeless("parameters", size, budget))
    if size + _trained_bytes([x for x in parameters if x.requires_grad], optimizer) <= budget:
        return
    more = _trained_bytes(trained(), optimizer)
    if size + more > budget:
        state = "" if optimizer in ("none", 0) else " and optimiser state"
        raise OutOfMemory(_hopeless(f"parameters, gradients{state}", size + more, budget))


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _trained_bytes(tensors: Collection[torch.Tensor], optimizer: str | int) -> int:
    """Their gradients, all of which are there when the backward ends, and optimiser state."""
    state = (state_bytes(optimizer, x.numel(), x.element_size()) for x in tensors)
    return _bytes(tensors) + sum(state)


def _hopeless(what: str, size: int, budget: int) -> str:
    return (
        f"no choice of strategies fits: {what} alone take {format_bytes(size)} on each rank, but "
        f"the budget is {format_bytes(budget)}.\n"
        "  Do: pass shard_states=True, which divides them by the ranks; give more memory, or use a "
        "smaller dtype. Without sharded states more ranks do not help."
    )


def refuse_hopeless(problem: Problem) -> None:
    """Before any strategy is looked at: what is there outside attention is too much alone.

    Raises
    ------
    OutOfMemory
        It is; nothing of what attention needs is counted then.
    """
    seq_len, world_size = longest(problem.sites), problem.world_size
    if problem.budget is None:
        return
    if never_below(problem.memory, world_size=world_size, seq_len=seq_len) > problem.budget:
        found = outside_peak(problem.memory, world_size=world_size, seq_len=seq_len)
        raise OutOfMemory(_text(problem, found, "outside attention alone"))


def explain_infeasible(problem: Problem) -> str:
    """What is needed, what it is made of, and the world size and length that would fit."""
    fitting = problem.at(problem.world_size)
    return _text(problem, fitting.peak(fitting.least()))


def _text(problem: Problem, found: Peak, what: str = "") -> str:
    assert problem.budget is not None
    largest = sorted(found.causes.items(), key=lambda part: -part[1])
    made_of = ", ".join(f"{name} {format_bytes(size)}" for name, size in largest if size)
    return (
        f"no choice of strategies fits: {problem.world_size} ranks need at least"
        f" {format_bytes(found.bytes)} each{f' {what}' if what else ''},"
        f" the budget is {format_bytes(problem.budget)}.\n"
        f"  Made of: {made_of}.\n"
        f"  Do: {_remedies(problem)}."
    )


def _remedies(problem: Problem) -> str:
    whole = whole_bytes(problem.memory)
    remedies = []
    if problem.budget is not None and sum(whole.values()) <= problem.budget:
        world_size = _smallest_world_size(problem)
        length = longest_that_fits(problem, longest(problem.sites))
        if world_size is not None:
            remedies.append(f"use {world_size} ranks or more")
        if length:
            remedies.append(f"shorten the sequence to {length:,} tokens or fewer")
    return ", or ".join(remedies) or (
        f"give more memory: {' and '.join(whole) or 'nothing'} alone"
        f" take {format_bytes(sum(whole.values()))}"
    )


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
                own_queries=not is_whole,
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
    assert problem.budget is not None
    at_least = bound(problem, world_size, scale)
    if at_least > 0:
        return at_least
    try:
        fitting = problem.at(world_size, scale)
    except RingfxError:
        return float("inf")
    return fitting.peak(fitting.least()).bytes - problem.budget


def _smallest_world_size(problem: Problem) -> int | None:
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
