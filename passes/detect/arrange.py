"""How a value lies in memory, as atomic axes, and the steps from one arrangement to another."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

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
        given, wanted = self._atoms(self.given), self._atoms(self.wanted)
        assert self.is_permutation, f"axes are lost or repeated between {given} and {wanted}"
        before = _sizes(self.given, size)
        split = tuple(size(a) for a in given)
        kept = [a for a in wanted if a in given]
        order = tuple(given.index(a) for a in kept)
        permuted = tuple(size(a) for a in kept)
        spaced = tuple(size(a) if a in given else 1 for a in wanted)
        expanded = tuple(size(a) for a in wanted)
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

    @staticmethod
    def _atoms(dims: tuple[Dim, ...]) -> tuple[int, ...]:
        return tuple(atom for dim in dims for atom in dim)


def _sizes(dims: tuple[Dim, ...], size: Size) -> tuple[int, ...]:
    return tuple(math.prod(size(a) for a in dim) for dim in dims)
