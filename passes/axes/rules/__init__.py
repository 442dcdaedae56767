"""The axis table: one row an operator family. It serves detection and the partitioner alike.

A row says which dimensions are one axis, and for each axis whether the operator may run on a part
of it (independent), leaves a partial sum, or needs all of it. An operator without a
row is an error that names it, never "replicate by default".
"""

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType

import torch

from ringfx.errors import InvalidArgument
from ringfx.passes.axes.call import AxisRule, AxisRules
from ringfx.passes.axes.rules import (
    attention,
    contraction,
    creation,
    gathered,
    indexing,
    losses,
    matrices,
    normalization,
    parallel,
    pointwise,
    reduction,
    transforms,
    views,
)
from ringfx.passes.capture.own_backward import OwnBackward
from ringfx.torch_compat.operators import OpOverload, OpOverloadPacket

__all__ = ["RULES", "AxisRules", "checked_rules", "find_rule"]

RULES: MappingProxyType[object, AxisRule] = MappingProxyType(
    dict(attention.RULES)
    | pointwise.RULES
    | views.RULES
    | contraction.RULES
    | reduction.RULES
    | normalization.RULES
    | matrices.RULES
    | indexing.RULES
    | creation.RULES
    | losses.RULES
    | transforms.RULES
    | gathered.RULES
    | parallel.RULES
)


def find_rule(target: object, rules: AxisRules = RULES) -> AxisRule | None:
    """The row for an operator; operators tagged pointwise share one."""
    if isinstance(target, OwnBackward):
        from ringfx.passes.axes.bodies import own_backward  # which names the axes of bodies itself

        return partial(own_backward, rules=rules)
    rule = rules.get(target)
    if rule is None and isinstance(target, OpOverload):
        rule = rules.get(target.name())
    if rule is None and isinstance(target, OpOverload) and torch.Tag.pointwise in target.tags:
        draws = torch.Tag.nondeterministic_seeded in target.tags
        return pointwise.random_elementwise if draws else pointwise.elementwise
    return rule


def checked_rules(given: object) -> AxisRules:
    """A user's table, which nobody can change any more.

    Raises
    ------
    InvalidArgument
        It is no mapping from operators to functions.
    """
    table = "ringfx.RULES | {torch.ops.my.op.default: rule}"
    if not isinstance(given, Mapping):
        raise InvalidArgument(f"rules is a {type(given).__name__}. Do: give a mapping, {table}.")
    for op, rule in given.items():
        if isinstance(op, OpOverloadPacket):
            overloads = ", ".join(f"{op}.{name}" for name in op.overloads())
            raise InvalidArgument(
                f"rules: {op} has overloads, and each has a row of its own. Do: use {overloads}."
            )
        if not (callable(op) or isinstance(op, str)):
            raise InvalidArgument(f"rules: the key {op!r} is no operator. Do: give {table}.")
        if not callable(rule):
            found = type(rule).__name__
            raise InvalidArgument(f"rules[{op}] is a {found}, no function. Do: give {table}.")
    return MappingProxyType(dict(given))
