"""Axes that hold the same tokens at different offsets: slices, and pieces of a concatenation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from ringfx.passes.axes import AxisMap
from ringfx.passes.axes.propagate import BoundWindow
from ringfx.passes.axes.space import Dim

__all__ = ["Families", "find_families"]


@dataclass
class Families:
    """For each axis its family and the position of its first element in it.

    Where the program says two things (in ``x[:, 1:] - x[:, :-1]`` one axis has two offsets in x)
    the first counts, and the other is a shift.
    """

    _place: dict[Dim, tuple[int, int]] = field(default_factory=dict)
    _kin: dict[int, list[Dim]] = field(default_factory=dict)

    def join(self, source: Dim, result: Dim, start: int) -> None:
        """Element i of ``result`` is element ``start + i`` of ``source``."""
        for dim in (source, result):
            if dim not in self._place:
                self._place[dim] = (len(self._place), 0)
                self._kin[self._place[dim][0]] = [dim]
        (family, at), (other, at_result) = self._place[source], self._place[result]
        if family == other:
            return
        moved = self._kin.pop(other)
        for dim in moved:
            self._place[dim] = (family, self._place[dim][1] - at_result + at + start)
        self._kin[family] += moved

    def relatives(self, axis: Dim) -> Iterator[tuple[Dim, int]]:
        """Other axes of the family and their offset from the axis, in the order of joining."""
        if axis not in self._place:
            return
        family, at = self._place[axis]
        for other in self._kin[family]:
            if other != axis:
                yield other, self._place[other][1] - at

    def widest(self, axis: Dim, size: Callable[[Dim], int]) -> Dim:
        """The longest axis of the family that has all of this one's elements, and few others.

        A table of positions is longer than the tokens that take its first rows.
        """
        length = size(axis)
        around = [
            other
            for other, offset in self.relatives(axis)
            if offset <= 0 and length <= offset + size(other) and size(other) <= 2 * length
        ]
        return max((axis, *around), key=size)


def find_families(axes: AxisMap) -> Families:
    """Join the axes of all windows, those of the largest values first."""
    families = Families()
    for window in sorted(axes.windows, key=_weight):
        source, result = axes.space.resolve(window.source), axes.space.resolve(window.result)
        if source and result:
            families.join(source, result, window.start)
    return families


def _weight(window: BoundWindow) -> int:
    value = window.node.meta["val"]
    values = value if isinstance(value, (tuple, list)) else [value]
    return -sum(v.numel() for v in values if isinstance(v, torch.Tensor))
