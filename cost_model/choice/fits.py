"""What fits one budget: the fastest choice, the least one, the last number that does.

What attention saves does not depend on the strategy, so a choice is fitted by one bound on saved
bytes and the shared workspace (``budget.py``), and the largest bound whose choice fits is searched:
the peak itself is taken from the timeline, at each of whose moments only some layers count. So what
is found can be bettered: layer by layer, from the last, a faster option is taken where all still
fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np

from ringfx.cost_model.choice import budget
from ringfx.cost_model.choice.budget import Menu
from ringfx.cost_model.choice.checkpoints import as_held
from ringfx.cost_model.prediction.predict import Prediction
from ringfx.ir.memory_peaks import Numbers, Peaks
from ringfx.ir.memory_plan import MemoryTimeline
from ringfx.ir.memory_timeline import Peak, in_order, never_below, peak
from ringfx.ir.values import AttentionSite

__all__ = ["Fitting", "Picked", "last_that_fits"]

Picked: TypeAlias = tuple[int, ...]

Kind: TypeAlias = tuple[bool, bool, bool]
"""Whether a layer is computed again, its attention too, and offloaded."""

ROOM_STEPS = 1024
"""The bound is found to so many parts of the budget."""

AT_ONCE = 256
"""Choices whose peaks are taken at once: a few megabytes, for hundreds of moments."""


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

    @cached_property
    def _order(self) -> Numbers:
        """The number of each layer of the timeline among the sites; one beyond them: none."""
        found = in_order(self.memory, self.sites, range(len(self.sites)))
        return np.array([len(self.sites) if i is None else i for i in found], np.int64)

    @cached_property
    def _peaks(self) -> Peaks:
        menus: list[Sequence[Prediction | None]] = [*self.menus, (None,)]
        return Peaks(
            self.memory, [menus[i] for i in self._order],
            world_size=self.world_size, seq_len=self.seq_len,
        )  # fmt: skip

    def _of_each(self, choices: Numbers) -> Numbers:
        """The peak under each of some choices, in rows."""
        nothing = np.zeros((len(choices), 1), np.int64)
        ordered = np.hstack([choices, nothing])[:, self._order]
        starts = range(0, max(len(ordered), 1), AT_ONCE)
        return np.concatenate([self._peaks.of(ordered[i : i + AT_ONCE]) for i in starts])

    def _bytes(self, picked: Picked) -> int:
        return int(self._of_each(np.array([picked], np.int64))[0])

    @cached_property
    def _held(self) -> Sequence[Menu]:
        """The options with the bytes that each adds to the peak."""
        return as_held(self.sites, self.menus)

    @cached_property
    def least(self) -> Picked:
        """The choice that needs least."""
        smallest = budget.smallest(self._held)
        return min(map(self._smaller, {smallest, *self._alike()}), key=self._bytes)

    @cached_property
    def _kinds(self) -> Sequence[Mapping[Kind, int]]:
        """For each layer its smallest option of each kind."""
        found = []
        for menu in self._held:
            of_layer: dict[Kind, int] = {}
            for i, option in enumerate(menu):
                kind = option.recomputed, option.attention_again, option.offloaded
                before = of_layer.setdefault(kind, i)
                if _alone(option) < _alone(menu[before]):
                    of_layer[kind] = i
            found.append(of_layer)
        return found

    def _alike(self) -> Iterator[Picked]:
        """Choices of one kind throughout; of a layer that has none of it the smallest."""
        smallest = [_smallest(menu) for menu in self._held]
        for kind in {kind for of_layer in self._kinds for kind in of_layer}:
            yield tuple(
                of_layer.get(kind, i) for of_layer, i in zip(self._kinds, smallest, strict=True)
            )
        yield tuple(smallest)

    def _smaller(self, picked: Picked) -> Picked:
        """With options of other kinds as long as they need less beside the others."""

        def least(sizes: Numbers, now: int) -> int | None:
            best = int(sizes.argmin())
            return best if sizes[best] < now else None

        return self._bettered(picked, lambda layer, _: [*self._kinds[layer].values()], least)

    def _bettered(
        self,
        picked: Picked,
        offered: Callable[[int, int], Sequence[int]],
        taken: Callable[[Numbers, int], int | None],
    ) -> Picked:
        """One layer after the other takes another option, from the last to the first and again,
        until none does. Several are weighed at once: more of them as long as none does.

        Parameters
        ----------
        offered
            Of a layer and its option, the options that it may take instead.
        taken
            Of the peak with each of these, and the peak now, which one it takes; None: none.
        """
        better, size = list(picked), self._bytes(picked)
        layer, still, width = len(better) - 1, 0, 1
        while still < len(better):
            layers = [(layer - i) % len(better) for i in range(min(width, len(better) - still))]
            options = [offered(i, better[i]) for i in layers]
            sizes = self._with(better, layers, options)
            found = (taken(x, size) if len(x) else None for x in sizes)
            place, option = next(((i, x) for i, x in enumerate(found) if x is not None), (-1, 0))
            if place >= 0:
                better[layers[place]], size = options[place][option], int(sizes[place][option])
                layer, still, width = layers[place] - 1, 0, 1
            else:
                layer, still, width = layers[-1] - 1, still + len(layers), 2 * width
        return tuple(better)

    def _with(
        self, picked: Sequence[int], layers: Sequence[int], options: Sequence[Sequence[int]]
    ) -> Sequence[Numbers]:
        """The peak with each of some options of one layer, for some layers."""
        counts, each = [len(some) for some in options], [x for some in options for x in some]
        choices = np.tile(np.array(picked, np.int64), (len(each), 1))
        choices[np.arange(len(each)), np.repeat(layers, counts)] = each
        return np.split(self._of_each(choices), np.cumsum(counts)[:-1])

    def fastest(self, memory: int | None) -> Picked | None:
        """The fastest choice that fits; None if none does."""
        fastest = tuple(0 for _ in self.menus)
        if memory is None or self._bytes(fastest) <= memory:
            return fastest
        if self._bytes(self.least) > memory:
            return None
        return self._within(memory, self.least, fastest)

    def _within(self, memory: int, least: Picked, fastest: Picked) -> Picked:
        best, menus = least, self._held
        outside = never_below(self.memory, world_size=self.world_size, seq_len=self.seq_len)
        low, high = budget.peak(menus, best), budget.peak(menus, fastest)
        room = min(max(low, memory - outside), high)
        while high - low > memory // ROOM_STEPS or room == memory - outside:
            picked = budget.assign(menus, room)
            if picked is not None and self._bytes(picked) <= memory:
                best = min(best, picked, key=self.time)
                low = room
            else:
                high = room
            room = (low + high) // 2
            if room == low:
                break
        found = [
            self._faster(x, memory, one_by_one) for x in (best, least) for one_by_one in (0, 1)
        ]
        return min(found, key=self.time)

    def _faster(self, picked: Picked, memory: int, one_by_one: int) -> Picked:
        """With faster options where they fit beside the others, the last layers' first: backward is
        done with what these keep when it comes to the others. The fastest that fits at once, or the
        next faster one in turn."""

        def faster(_: int, now: int) -> Sequence[int]:
            return range(now)[::-1] if one_by_one else range(now)

        def first_that_fits(sizes: Numbers, _: int) -> int | None:
            fits = np.flatnonzero(sizes <= memory)
            return int(fits[0]) if len(fits) else None

        return self._bettered(picked, faster, first_that_fits)

    def time(self, picked: Picked) -> float:
        return sum(menu[i].cost_ms for menu, i in zip(self.menus, picked, strict=True))


def _smallest(menu: Menu) -> int:
    return min(range(len(menu)), key=lambda i: _alone(menu[i]))


def _alone(option: Prediction) -> int:
    return option.saved_bytes + option.workspace_bytes


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
