"""What fits one budget: the fastest choice, the least one, the last number that does.

What attention saves does not depend on the strategy, so a choice is fitted by one bound on saved
bytes and the shared workspace (``budget.py``), and the largest bound whose choice fits is searched:
the peak itself is taken from the timeline, at each of whose moments only some layers count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ringfx.cost_model.choice import budget
from ringfx.cost_model.choice.budget import Menu
from ringfx.cost_model.choice.checkpoints import as_held
from ringfx.ir.memory_plan import MemoryTimeline
from ringfx.ir.memory_timeline import Peak, in_order, never_below, peak
from ringfx.ir.values import AttentionSite

__all__ = ["Fitting", "last_that_fits"]

Picked: TypeAlias = tuple[int, ...]

ROOM_STEPS = 1024
"""The bound is found to so many parts of the budget."""


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """The options of all layers against the timeline, at one length and number of ranks."""

    sites: Sequence[AttentionSite]
    menus: Sequence[Menu]
    """Fastest first."""
    world_size: int
    memory: MemoryTimeline

    @property
    def seq_len(self) -> int:
        return longest(self.sites)

    def peak(self, picked: Picked) -> Peak:
        held = [menu[i] for menu, i in zip(self.menus, picked, strict=True)]
        layers = in_order(self.memory, self.sites, held)
        return peak(self.memory, layers, world_size=self.world_size, seq_len=self.seq_len)

    def least(self) -> Picked:
        """The choice that needs least."""
        alone = tuple(
            min(range(len(menu)), key=lambda i: menu[i].saved_bytes + menu[i].workspace_bytes)
            for menu in as_held(self.sites, self.menus)
        )
        together = budget.smallest(as_held(self.sites, self.menus))
        return min(alone, together, key=lambda picked: self.peak(picked).bytes)

    def fastest(self, memory: int | None) -> Picked | None:
        """The fastest choice that fits; None if none does."""
        fastest = tuple(0 for _ in self.menus)
        if memory is None or self.peak(fastest).bytes <= memory:
            return fastest
        least = self.least()
        if self.peak(least).bytes > memory:
            return None
        return self._within(memory, least, fastest)

    def _within(self, memory: int, best: Picked, fastest: Picked) -> Picked:
        menus = as_held(self.sites, self.menus)
        outside = never_below(self.memory, world_size=self.world_size, seq_len=self.seq_len)
        low, high = budget.peak(menus, best), budget.peak(menus, fastest)
        room = min(max(low, memory - outside), high)
        while high - low > memory // ROOM_STEPS or room == memory - outside:
            picked = budget.assign(menus, room)
            if picked is not None and self.peak(picked).bytes <= memory:
                best = min(best, picked, key=self._time)
                low = room
            else:
                high = room
            room = (low + high) // 2
            if room == low:
                break
        return best

    def _time(self, picked: Picked) -> float:
        return sum(menu[i].cost_ms for menu, i in zip(self.menus, picked, strict=True))


def longest(sites: Sequence[AttentionSite]) -> int:
    """The longest sequence."""
    return max((site.kv_len for site in sites), default=1)


def last_that_fits(excess: Callable[[int], float], low: int, high: int, step: int = 1) -> int:
    """The last number between one that fits and one that does not, to within ``step``.

    ``excess`` is bytes beyond the budget. They grow about evenly, so a line through both ends says
    where to look next; where that brings the ends no nearer, the middle does.

    >>> last_that_fits(lambda n: 3 * n - 1000, 1, 10**9)
    333
    """
    over_low, over_high = excess(low) if low else float("-inf"), excess(high)
    by_line = True
    while high - low > step:
        middle = (low + high) // 2
        if by_line and abs(over_low) < float("inf") > over_high:
            share = -over_low / (over_high - over_low)
            middle = low + round(share * (high - low))
            middle = min(max(middle, low + step), high - step) if high - low > 2 * step else middle
            middle = min(max(middle, low + 1), high - 1)
        width = high - low
        over = excess(middle)
        if over <= 0:
            low, over_low = middle, over
        else:
            high, over_high = middle, over
        by_line = high - low < width // 2 or not by_line
    return low
