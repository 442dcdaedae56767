"""Tensors without values, and what is at work while a program is traced on them.

Each name says what it is needed for and, after "Without", what a release that drops it breaks.
"""

from __future__ import annotations

from typing import Any

import torch._guards
import torch._subclasses.fake_tensor as fake
from torch import Tensor

__all__ = [
    "DataDependentOutputException", "DynamicOutputShapeException", "FakeTensor", "FakeTensorMode",
    "TracingContext", "as_fake", "detect_fake_mode", "forget_dynamic_marks", "symbol_name",
    "unset_fake_temporarily",
]  # fmt: skip

FakeTensor = fake.FakeTensor
"""Shape, type and device of a value of the program. Without: all planning."""

FakeTensorMode = fake.FakeTensorMode
"""Under which operators give fake tensors. Without: all planning."""

DataDependentOutputException = fake.DataDependentOutputException
"""A value was asked of a fake tensor (``.item()``). Without: planning where models read values."""

DynamicOutputShapeException = fake.DynamicOutputShapeException
"""A result's shape depends on values (``nonzero``). Without: planning where models read values."""

unset_fake_temporarily = fake.unset_fake_temporarily
"""Real tensors while a program is traced. Without: proofs of attention, masks from buffers."""

detect_fake_mode = torch._guards.detect_fake_mode
"""The mode of which some values are. Without: axes of loop and branch bodies."""

TracingContext = torch._guards.TracingContext
"""Dynamo's state of the program that it traces: its fake mode, whether there is one at all.
Without: capture in Dynamo's own mode, values that stay split after a graph break."""


def as_fake(mode: fake.FakeTensorMode, value: Tensor) -> Tensor:
    """The tensor as a fake one of static shape, of which no number can be read.

    Since 2.15 a mode outside Dynamo remembers the number of a scalar, and would write it into the
    program. Without: all planning.
    """
    made = mode.from_tensor(value, static_shapes=True)
    if isinstance(made.item_memo, int | float):
        made.item_memo = None
    return made


def forget_dynamic_marks(mode: fake.FakeTensorMode) -> None:
    """``mark_dynamic`` demands that no program is made for one size; Dynamo would raise for it.

    Without: models whose inputs are marked raise ConstraintViolationError.
    """
    env = mode.shape_env
    for tracked in (env.tracked_fakes if env is not None else None) or ():
        sizes = getattr(tracked.symbolic_context, "constraint_sizes", None)
        if sizes:
            sizes[:] = [None] * len(sizes)


def symbol_name(value: FakeTensor) -> str | None:
    """The symbol of the number that a fake scalar was read as; None if nobody has read it.

    Without: floats that Dynamo hands over as tensors (``dynamic=True``).
    """
    memo: Any = value.item_memo
    # The symbol, not what it was replaced with: Dynamo looks it up in the same way.
    return None if memo is None else getattr(memo.node._expr, "name", None)
