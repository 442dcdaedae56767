"""The calls that bring values into canonical form and the result back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from ringfx.passes.axes.arrangement import Arrangement
from ringfx.passes.capture.gradients import needs_grad

__all__ = ["Emitter"]

aten = torch.ops.aten


class Emitter:
    """Inserts calls before a node, with what later passes read off them."""

    def __init__(self, graph: Graph, before: Node) -> None:
        self._graph = graph
        self._before = before

    def call(self, target: Any, *args: Any, value: Any = None, **kwargs: Any) -> Node:
        """A call that stands where the old one stood; its fake value is computed if not given."""
        with self._graph.inserting_before(self._before):
            node = self._graph.call_function(target, args, kwargs)
        node.meta = {k: v for k, v in self._before.meta.items() if k != "val"}
        inputs = node.all_input_nodes
        node.meta["ringfx_needs_grad"] = any(needs_grad(n) for n in inputs)
        if value is None:
            given = torch.fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
            value = target(*given[0], **given[1])
        node.meta["val"] = value
        return node

    def arrange(self, value: Node, arrangement: Arrangement, sizes: Mapping[int, int]) -> Node:
        """The value in the wanted arrangement; itself where it has it."""
        steps = arrangement.steps(sizes.__getitem__)
        for target, argument in (
            (aten.reshape.default, steps.split),
            (aten.permute.default, steps.order),
            (aten.reshape.default, steps.spaced),
            (aten.expand.default, steps.expanded),
            (aten.reshape.default, steps.merged),
        ):
            if argument is not None:
                value = self.call(target, value, list(argument))
        return value

    def join(self, parts: Sequence[Node]) -> Node:
        """Parts of the head dim, one after the other."""
        return parts[0] if len(parts) == 1 else self.call(aten.cat.default, list(parts), -1)

    def scale(self, value: Node, factor: float) -> Node:
        return value if factor == 1 else self.call(aten.mul.Tensor, value, factor)

    def cast(self, value: Node, dtype: torch.dtype) -> Node:
        if value.meta["val"].dtype == dtype:
            return value
        return self.call(aten.to.dtype, value, dtype)
