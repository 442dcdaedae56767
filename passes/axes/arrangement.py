"""How a value lies in memory, as atomic axes, and the steps from one arrangement to another."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from ringfx.passes.axes.space import Dim

__all__ = ["Arrangement", "Steps"]

Size = Callable[[int], int]
"""The size of an atomic axis."""


@dataclass(frozen=True, kw_only=True)
class Steps:
    """view, permute, view, expand, view: each None where it would change nothing."""

    split: tuple[int, ...] | None
    order: tuple[int, ...] | None
    spaced: tuple[int, ...] | None
    """Sizes with a 1 for each new axis."""
    expanded: tuple[int, ...] | None
    merged: tuple[int, ...] | None


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """The axes of each dimension of a value, and those of what is made of it.

    Axes that the value has not are broadcast. None are lost.
    """

    given: tuple[Dim, ...]
    wanted: tuple[Dim, ...]

    def reversed(self) -> Arrangement:
        return Arrangement(given=self.wanted, wanted=self.given)

    @property
    def is_permutation(self) -> bool:
        given, wanted = self._atoms(self.given), self._atoms(self.wanted)
        return len(set(wanted)) == len(wanted) and set(given) <= set(wanted)

    def shape(self, size: Size) -> tuple[int, ...]:
        return _sizes(self.wanted, size)

    def steps(self, size: Size) -> Steps:
        assert self.is_permutation, f"axes are lost or repeated: {self.given} to {self.wanted}"
        given, wanted = self._runs(self.given), self._runs(self.wanted)
        before = _sizes(self.given, size)
        split = _sizes(given, size)
        kept = [a for a in wanted if a in given]
        order = tuple(given.index(a) for a in kept)
        permuted = _sizes(tuple(kept), size)
        spaced = _sizes(tuple(a if a in given else () for a in wanted), size)
        expanded = _sizes(wanted, size)
        merged = self.shape(size)
        moves = order != tuple(range(len(order)))
        if not moves and expanded == spaced:
            return Steps(
                split=None, order=None, spaced=None, expanded=None,
                merged=None if before == merged else merged,
            )  # fmt: skip
        return Steps(
            split=None if before == split else split,
            order=order if moves else None,
            spaced=None if spaced == permuted else spaced,
            expanded=None if expanded == spaced else expanded,
            merged=None if merged == expanded else merged,
        )

    def _runs(self, dims: tuple[Dim, ...]) -> tuple[Dim, ...]:
        """The axes, those that stay side by side kept together: tokens that are rows and columns of
        patches elsewhere are tokens here."""
        together = _neighbours(self.given) & _neighbours(self.wanted)
        runs: list[Dim] = []
        for dim in dims:
            for i, atom in enumerate(dim):
                if i and (dim[i - 1], atom) in together:
                    runs[-1] += (atom,)
                else:
                    runs.append((atom,))
        return tuple(runs)

    @staticmethod
    def _atoms(dims: tuple[Dim, ...]) -> tuple[int, ...]:
        return tuple(atom for dim in dims for atom in dim)


def _neighbours(dims: tuple[Dim, ...]) -> set[tuple[int, int]]:
    return {pair for dim in dims for pair in pairwise(dim)}


def _sizes(dims: tuple[Dim, ...], size: Size) -> tuple[int, ...]:
    return tuple(math.prod(size(a) for a in dim) for dim in dims)
