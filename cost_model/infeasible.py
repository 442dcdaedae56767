"""When nothing fits: what the peak is made of, and the nearest thing that would."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch

from ringfx.cost_model.budget import Menu
from ringfx.cost_model.fitting import Fitting, last_that_fits, longest
from ringfx.cost_model.timeline import Peak, never_below, outside_peak, whole_bytes
from ringfx.errors import OutOfMemory, RingfxError
from ringfx.passes.values import AttentionSite
from ringfx.plan import MemoryTimeline
from ringfx.quantities import format_bytes

__all__ = [
    "MAX_WORLD_SIZE", "Problem", "excess", "explain_infeasible", "refuse_hopeless",
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

    def at(self, world_size: int, scale: float = 1.0) -> Fitting:
        """The options over so many ranks, with the sequences scaled."""
        sites = [scaled_site(site, scale) for site in self.sites]
        menus = self.menus(sites, world_size)
        return Fitting(sites=sites, menus=menus, world_size=world_size, memory=self.memory)


def refuse_parameters(parameters: Iterable[torch.Tensor], budget: int | None) -> None:
    """Before the model is traced: its parameters, which each rank holds, are too much alone.

    Raises
    ------
    OutOfMemory
        They are.
    """
    size = sum(x.numel() * x.element_size() for x in parameters)
    if budget is not None and size > budget:
        raise OutOfMemory(
            f"no choice of strategies fits: parameters alone take {format_bytes(size)} on each"
            f" rank, the budget is {format_bytes(budget)}.\n"
            "  Do: give more memory, or use a smaller dtype; more ranks do not help."
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
    found = outside_peak(problem.memory, world_size=world_size, seq_len=seq_len)
    if found.bytes > problem.budget:
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
    too_much = sum(whole.values())
    remedies = []
    if problem.budget is not None and too_much <= problem.budget:
        world_size = _smallest_world_size(problem)
        length = _longest_sequence(problem)
        if world_size is not None:
            remedies.append(f"use {world_size} ranks or more")
        if length:
            remedies.append(f"shorten the sequence to {length:,} tokens or fewer")
    return ", or ".join(remedies) or (
        f"give more memory: parameters and the like alone take {format_bytes(too_much)}"
    )


def excess(problem: Problem, world_size: int, scale: float = 1.0) -> float:
    """Bytes beyond the budget that the choice that needs least takes over so many ranks, with the
    sequences scaled; infinite where no strategy can run.

    Where it is too much outside attention alone, nothing else is counted.
    """
    assert problem.budget is not None
    seq_len = max(1, round(longest(problem.sites) * scale))
    outside = never_below(problem.memory, world_size=world_size, seq_len=seq_len)
    if outside > problem.budget:
        return outside - problem.budget
    try:
        fitting = problem.at(world_size, scale)
    except RingfxError:
        return float("inf")
    return fitting.peak(fitting.least()).bytes - problem.budget


def _smallest_world_size(problem: Problem) -> int | None:
    """By doubling, then halving the interval between what failed and what fits."""
    if excess(problem, MAX_WORLD_SIZE) > 0:
        return None
    low, high = problem.world_size, min(2 * problem.world_size, MAX_WORLD_SIZE)
    while excess(problem, high) > 0:
        low, high = high, min(2 * high, MAX_WORLD_SIZE)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if excess(problem, middle) <= 0 else (middle, high)
    return high


def _longest_sequence(problem: Problem) -> int:
    """The longest first sequence that fits at this world size, others scaled alike; 0: none."""
    length = longest(problem.sites)

    def over(seq_len: int) -> float:
        return excess(problem, problem.world_size, seq_len / length)

    return last_that_fits(over, 1, length) if length > 1 and over(1) <= 0 else 0


def scaled_site(site: AttentionSite, scale: float) -> AttentionSite:
    """The same attention over sequences of another length."""
    spec = site.spec
    q_len, kv_len = (max(1, round(n * scale)) for n in (spec.q_len, spec.kv_len))
    return replace(site, spec=replace(spec, q_len=q_len, kv_len=kv_len))
