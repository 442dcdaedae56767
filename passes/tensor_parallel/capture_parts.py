"""Capture of a program that may hold DTensors: for this rank's parts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch.fx import GraphModule

from ringfx.ir.values import Captured
from ringfx.passes.axes.call import AxisRules
from ringfx.passes.axes.rules import find_rule
from ringfx.passes.capture import capture
from ringfx.passes.tensor_parallel.calls import PlacedCalls
from ringfx.torch_compat.distributed import is_dtensor, is_mesh, local_part

__all__ = ["capture_parts", "example_parts"]


def example_parts(inputs: Sequence[Any]) -> list[Any]:
    """Example inputs with this rank's parts of DTensors; None for what only DTensors need."""
    return [local_part(x) if is_dtensor(x) else None if is_mesh(x) else x for x in inputs]


def capture_parts(gm: GraphModule, example_inputs: Sequence[Any], rules: AxisRules) -> Captured:
    """``ringfx.passes.capture.capture`` on parts, with an axis table."""
    known = partial(find_rule, rules=rules)
    return capture(gm, example_parts(example_inputs), known=known, on_placed=PlacedCalls(known))
