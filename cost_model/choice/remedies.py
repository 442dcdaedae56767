"""What would fit where nothing does: the nearest changes, each with its figure.

Arguments that forbid what there is, such as ``recompute="none"``, cost time and no machines, so
they come first, the fastest before the others, and several together only where none is enough
alone; then more ranks, then fewer tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations, groupby
from typing import Any, TypeAlias

from ringfx.cost_model.choice.fits import Fitting, Picked, longest
from ringfx.cost_model.choice.problem import (
    MAX_WORLD_SIZE,
    Problem,
    excess,
    longest_that_fits,
    smallest_world_size,
)
from ringfx.ir.memory_timeline import whole_bytes
from ringfx.units.argument import Argument
from ringfx.units.format import format_bytes, format_ms

__all__ = ["remedies"]


def remedies(problem: Problem) -> list[str]:
    """Changes after which a choice fits, in words; empty: none was found."""
    variants = list(_variants(problem))
    found = [*_of_arguments(variants), *_of_size(problem)]
    if found or not variants:
        return found
    # No number of ranks divides what each of them has whole: only with all arguments together.
    arguments, most = variants[-1]
    return [f"{_and(arguments)}, and {text}" for text in _of_size(most)]


Variant: TypeAlias = tuple[tuple[Argument, ...], Problem]
"""Arguments, and the problem with what they allow."""


def _variants(problem: Problem) -> Iterator[Variant]:
    """The fewest arguments first."""
    single = _more(problem)
    for count in range(1, len(single) + 1):
        for arguments in combinations(single, count):
            changes: dict[str, Any] = {x.name: x.value for x in arguments}
            yield arguments, problem.variant(replace(problem.asked, **changes))


def _more(problem: Problem) -> Sequence[Argument]:
    """Single arguments that leave more choice; ``Asked`` has fields of their names."""
    found: list[Argument] = []
    asked, segments = problem.asked, problem.memory.segments
    if segments and asked.recompute in ("none", "layers"):
        found.append(Argument("recompute", "auto"))
    if segments and asked.offload == "none" and problem.knows_host:
        found.append(Argument("offload", "auto"))
    if problem.can_shard:
        found.append(Argument("shard_states", True))
    return found


def _of_arguments(variants: Iterable[Variant]) -> Iterator[str]:
    """The fewest that are enough, the fastest first."""
    for _, alike in groupby(variants, key=lambda variant: len(variant[0])):
        found = []
        for arguments, problem in alike:
            if excess(problem, problem.world_size) > 0:
                continue
            fitting = problem.at(problem.world_size)
            picked = fitting.fastest(problem.budget)
            if picked is not None:
                found.append(
                    (fitting.time(picked), f"{_and(arguments)} ({_figure(fitting, picked)})")
                )
        if found:
            yield from (text for _, text in sorted(found))
            return


def _figure(fitting: Fitting, picked: Picked) -> str:
    options = [menu[i] for menu, i in zip(fitting.menus, picked, strict=True)]
    again = [o for o in options if o.recomputed]
    words = [format_bytes(fitting.peak(picked).bytes)]
    if again:
        words.append(f"{len(again)} of {len(options)} layers computed again")
    if attention := sum(o.attention_again for o in again):
        words.append(f"{attention} of them with attention")
    if offloaded := sum(o.offloaded for o in options):
        words.append(f"{offloaded} offloaded")
    if ms := sum(o.again_ms + o.offload_ms for o in options):
        words.append(f"{format_ms(ms)} more a step")
    return ", ".join(words)


def _of_size(problem: Problem) -> Iterator[str]:
    """The smallest number of ranks and the longest sequence that fit."""
    whole = sum(whole_bytes(problem.memory).values())
    if problem.budget is None or whole > problem.budget:
        return

    def least(ranks: int, scale: float) -> str:
        assert problem.budget is not None
        return format_bytes(problem.budget + excess(problem, ranks, scale))

    if problem.world_size < MAX_WORLD_SIZE:
        ranks = smallest_world_size(problem)
        if ranks is not None:
            yield f"{ranks:,} ranks or more ({least(ranks, 1.0)} each)"
    length = longest(problem.sites)
    if tokens := longest_that_fits(problem, length):
        yield f"{tokens:,} tokens or fewer ({least(problem.world_size, tokens / length)})"


def _and(arguments: Sequence[Argument]) -> str:
    return " with ".join(map(str, arguments))
