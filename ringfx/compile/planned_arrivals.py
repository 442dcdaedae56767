"""What one planned program hands to the next: values that a run would leave split.

A plan runs programs whole, on fake tensors. Each result that ranks would have a part of is marked
with how, and the program that takes it is planned for this rank's part, as in a run. What Python
applies between two programs hands the mark on where a run would stay on each rank's own tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ringfx.ir.values import Arrival
from ringfx.passes.rewrite import LocalProgram
from ringfx.split_tensor.local_rules import indexed_dims, writes_where_it_is
from ringfx.split_tensor.single_op import OperandSpec, single_op_program
from ringfx.torch_compat.fake_tensors import TracingContext
from ringfx.torch_compat.operators import schema_of
from ringfx.torch_compat.pytree import tree_leaves

__all__ = ["arrived", "hand_on", "leave_split", "picked_from", "run_whole"]

_MARK = "ringfx_arrival"


def leave_split(results: Sequence[Any], local: LocalProgram) -> list[Any]:
    """The results of a program, marked."""
    lines = local.placement.lines
    for result, output in zip(results, local.outputs, strict=False):
        if output is not None and isinstance(result, torch.Tensor):
            setattr(result, _MARK, lines.arrival(output.token_dim))
    return list(results)


def run_whole(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """A program's results; what it applies inside hands no marks on."""
    with _INSIDE:
        return gm.forward(*inputs)


class _Inside:
    """Whether a planned program runs; programs do not run inside each other."""

    depth = 0

    def __enter__(self) -> None:
        self.depth += 1

    def __exit__(self, *error: object) -> None:
        self.depth -= 1


_INSIDE = _Inside()


def hand_on(func: Any, args: Any, kwargs: Any, made: Any) -> None:
    """Marks the results of an operator that Python applied to marked tensors.

    A write that is not elementwise makes a run gather what is written.
    """
    if _INSIDE.depth or TracingContext.try_get() is not None:
        return
    if schema_of(func).is_mutable:
        if args and hasattr(args[0], _MARK) and not writes_where_it_is(func):
            delattr(args[0], _MARK)
        return
    if not arrived(tree_leaves((args, kwargs))):
        return
    call = single_op_program(func, args, kwargs, _given, 0, "ringfx")
    if call is None:
        return
    for result, output in zip(tree_leaves(made), call.outputs, strict=True):
        if output is not None:
            setattr(result, _MARK, output[1])


def picked_from(func: Any, args: Any) -> torch.Tensor | None:
    """The marked tensor of which Python picks tokens by index, which a run gathers for it."""
    source: torch.Tensor = args[0]
    arrival = getattr(source, _MARK, None)
    if arrival is None or _INSIDE.depth or TracingContext.try_get() is not None:
        return None
    if func is torch.ops.aten.index.Tensor and arrival.dim not in indexed_dims(args[1]):
        return None
    stays = single_op_program(func, args, {}, _given, 0, "ringfx") is not None
    return None if stays else source


def _given(x: torch.Tensor) -> OperandSpec:
    return OperandSpec(
        shape=tuple(x.shape), dtype=x.dtype, device=x.device, arrival=getattr(x, _MARK, None)
    )


def arrived(inputs: Sequence[Any]) -> dict[int, Arrival]:
    """How inputs of a program are split, by their number."""
    marked = ((i, getattr(x, _MARK, None)) for i, x in enumerate(inputs))
    return {i: arrival for i, arrival in marked if arrival is not None}
