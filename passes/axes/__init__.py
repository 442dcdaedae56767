"""Axes: every dimension of every tensor gets named axes, by unification.

A dimension is an ordered product of atomic axes, so ``[B, S, H] -> [B*S, H]`` keeps the token axis.
Operators unify axes (a product's contracted dimensions are one axis), cut one where a reshape cuts
it, or make fresh ones. Sizes never identify an axis: S may equal the hidden size.
"""

from ringfx.passes.axes.propagate import AxisMap, name_axes

__all__ = ["AxisMap", "name_axes"]
