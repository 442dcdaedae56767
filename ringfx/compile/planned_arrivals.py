"""What one planned program hands to the next: values that a run would leave split.

A plan runs programs whole, on fake tensors. Each result that ranks would have a part of is marked
with how, and the program that takes it is planned for this rank's part, as in a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ringfx.ir.values import Arrival
from ringfx.passes.rewrite import LocalProgram

__all__ = ["arrived", "leave_split"]


def leave_split(results: Sequence[Any], local: LocalProgram) -> list[Any]:
    """The results of a program, marked."""
    lines = local.placement.lines
    for result, output in zip(results, local.outputs, strict=False):
        if output is not None and isinstance(result, torch.Tensor):
            result.ringfx_arrival = lines.arrival(output.carried)  # type: ignore[attr-defined]
    return list(results)


def arrived(inputs: Sequence[Any]) -> dict[int, Arrival]:
    """How inputs of a program are split, by their number."""
    marked = ((i, getattr(x, "ringfx_arrival", None)) for i, x in enumerate(inputs))
    return {i: arrival for i, arrival in marked if arrival is not None}
