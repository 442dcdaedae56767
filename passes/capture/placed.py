"""A DTensor as a program of plain tensors holds it: this rank's part, and how it is placed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ringfx.errors import CaptureRefused
from ringfx.torch_compat.distributed import Placed, is_dtensor
from ringfx.torch_compat.pytree import tree_leaves

__all__ = ["PlacedCalls", "PlacedValue", "has_placed", "holds_dtensors", "plain_results"]


@dataclass(frozen=True, eq=False)
class PlacedValue:
    """What stands for a DTensor while its program is traced."""

    local: torch.Tensor
    placed: Placed


class PlacedCalls(Protocol):
    """What calls on DTensors are, as ``ringfx.passes.tensor_parallel`` says it."""

    def __call__(
        self, node: torch.fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The result of a call that takes or makes one."""


def holds_dtensors(gm: torch.fx.GraphModule) -> bool:
    """Whether any value of Dynamo's graph, or of a body below it, is a DTensor."""
    return any(
        is_dtensor(value)
        for module in gm.modules()
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
        for value in _leaves(node.meta.get("example_value"))
    )


def _leaves(value: Any) -> list[Any]:
    return tree_leaves(value) if isinstance(value, (tuple, list)) else [value]


def has_placed(node: torch.fx.Node, args: Any, kwargs: Any) -> bool:
    """Whether a call of Dynamo's graph takes or makes a DTensor."""
    values = tree_leaves((args, kwargs))
    made = _leaves(node.meta.get("example_value"))
    return any(isinstance(x, PlacedValue) for x in values) or any(map(is_dtensor, made))


def plain_results(results: Any) -> Any:
    """The results of a program, none of which may be a DTensor.

    Raises
    ------
    CaptureRefused
        One is: what follows would take this rank's part for the whole.
    """
    for number, value in enumerate(results):
        if isinstance(value, PlacedValue):
            raise CaptureRefused(
                f"output {number} of the program is a DTensor placed as {value.placed}, of which a "
                "rank has only a part. Do: let its module give plain tensors "
                "(use_local_output=True, output_layouts=Replicate()), and compute the loss of "
                "those; where the graph breaks and you call torch.compile(backend='ringfx'), call "
                "ringfx.optimize(model) instead, which keeps modules and their hooks together."
            )
    return results
