"""An axis on a token line."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ringfx.passes.axes.space import Dim

__all__ = ["AxisOnLine"]


@dataclass(frozen=True)
class AxisOnLine:
    """An axis that lies on a token line: its element i is at position ``offset + i``.

    ``logits[:, :-1]`` is such a window: split, it is stored as the logits themselves.
    """

    axis: Dim
    offset: int
    length: int
    copies: int = 1
    """Elements of the axis a token has: more than one for rows that are sorted."""
    is_sorted: bool = False
    """Rows in an order of their own on each rank: they can be neither gathered nor sliced."""

    def opened(self, inner: int) -> AxisOnLine:
        """The same place counted in the ``inner`` elements that a token of the line has."""
        return replace(self, offset=self.offset * inner, length=self.length * inner)
