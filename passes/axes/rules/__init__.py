"""The axis table: one row an operator family. It serves detection and the partitioner alike.

A row says which dimensions are one axis, and for each axis whether the operator may run on a part
of it (independent), leaves a partial sum, or needs all of it (replicated). An operator without a
row is an error that names it, never "replicate by default".
"""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch._ops import OpOverload

from ringfx.passes.axes.call import AxisRule
from ringfx.passes.axes.rules import (
    attention,
    contraction,
    creation,
    gathered,
    indexing,
    losses,
    normalization,
    pointwise,
    reduction,
    transforms,
    views,
)
from ringfx.passes.capture.own_backward import OwnBackward

__all__ = ["AXIS_RULES", "find_rule"]

AXIS_RULES: Mapping[object, AxisRule] = MappingProxyType(
    dict(attention.RULES)
    | pointwise.RULES
    | views.RULES
    | contraction.RULES
    | reduction.RULES
    | normalization.RULES
    | indexing.RULES
    | creation.RULES
    | losses.RULES
    | transforms.RULES
    | gathered.RULES
)


def find_rule(target: object) -> AxisRule | None:
    """The row for an operator; operators tagged pointwise share one."""
    if isinstance(target, OwnBackward):
        from ringfx.passes.axes.bodies import own_backward  # which names the axes of bodies itself

        return own_backward
    rule = AXIS_RULES.get(target)
    if rule is None and isinstance(target, OpOverload):
        rule = AXIS_RULES.get(target.name())
    if rule is None and isinstance(target, OpOverload) and torch.Tag.pointwise in target.tags:
        draws = torch.Tag.nondeterministic_seeded in target.tags
        return pointwise.random_elementwise if draws else pointwise.elementwise
    return rule
