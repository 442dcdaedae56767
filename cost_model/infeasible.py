"""When nothing fits: what the peak is made of, and the nearest thing that would."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from ringfx.cost_model.budget import Menu, least_memory
from ringfx.errors import RingfxError
from ringfx.passes.values import AttentionSite
from ringfx.quantities import format_bytes

__all__ = ["MAX_WORLD_SIZE", "Problem", "explain_infeasible", "scaled_site"]

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
    budget: int
    fixed_bytes: int
    split_bytes: int
    outside: Mapping[str, int]
    """What the two are made of."""


def explain_infeasible(problem: Problem) -> str:
    """What is needed, what it is made of, and the world size and length that would fit."""
    saved, workspace = _attention(problem.sites, problem.world_size, problem)
    needed = problem.fixed_bytes + problem.split_bytes + saved + workspace
    outside = problem.outside or {"outside attention": problem.fixed_bytes + problem.split_bytes}
    parts = {
        **outside,
        "saved by attention for backward": saved,
        "attention's workspace": workspace,
    }
    largest = sorted(parts.items(), key=lambda part: -part[1])
    made_of = ", ".join(f"{name} {format_bytes(size)}" for name, size in largest if size)
    return (
        f"no choice of strategies fits: {problem.world_size} ranks need at least"
        f" {format_bytes(needed)} each, the budget is {format_bytes(problem.budget)}.\n"
        f"  Made of: {made_of}.\n"
        f"  Do: {_remedies(problem)}."
    )


def _remedies(problem: Problem) -> str:
    world_size = _smallest_world_size(problem)
    length = _longest_sequence(problem)
    remedies = []
    if world_size is not None:
        remedies.append(f"use {world_size} ranks or more")
    if length:
        remedies.append(f"shorten the sequence to {length:,} tokens or fewer")
    return ", or ".join(remedies) or (
        f"give more memory: parameters and the like alone take {format_bytes(problem.fixed_bytes)}"
    )


def _attention(
    sites: Sequence[AttentionSite], world_size: int, problem: Problem
) -> tuple[int, int]:
    """Saved bytes and workspace of the assignment that needs least."""
    options = least_memory(problem.menus(sites, world_size))
    saved = sum(option.saved_bytes for option in options)
    return saved, max((option.workspace_bytes for option in options), default=0)


def _fits(problem: Problem, world_size: int, scale: float = 1.0) -> bool:
    """Whether so many ranks hold the model with its sequences scaled."""
    sites = [scaled_site(site, scale) for site in problem.sites]
    try:
        attention = sum(_attention(sites, world_size, problem))
    except RingfxError:
        return False
    split = problem.split_bytes * scale * problem.world_size / world_size
    return problem.fixed_bytes + split + attention <= problem.budget


def _smallest_world_size(problem: Problem) -> int | None:
    """By doubling, then halving the interval between what failed and what fits."""
    low, high = problem.world_size, 2 * problem.world_size
    while not _fits(problem, high):
        low, high = high, 2 * high
        if high > MAX_WORLD_SIZE:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _fits(problem, middle) else (middle, high)
    return high


def _longest_sequence(problem: Problem) -> int:
    """The longest first sequence that fits at this world size, others scaled alike; 0: none."""
    length = max(site.kv_len for site in problem.sites)
    low, high = 0, length
    while high - low > 1:
        middle = (low + high) // 2
        fits = _fits(problem, problem.world_size, middle / length)
        low, high = (middle, high) if fits else (low, middle)
    return low


def scaled_site(site: AttentionSite, scale: float) -> AttentionSite:
    """The same attention over sequences of another length."""
    spec = site.spec
    q_len, kv_len = (max(1, round(n * scale)) for n in (spec.q_len, spec.kv_len))
    return replace(site, spec=replace(spec, q_len=q_len, kv_len=kv_len))
