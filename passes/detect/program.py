"""What detection asks about a whole program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.fx import Node

from ringfx.passes.axes import AxisMap, name_axes
from ringfx.passes.axes.call import AxisRules
from ringfx.passes.axes.features import feature_axes, learned_values
from ringfx.passes.axes.space import Dim

__all__ = ["Program"]


@dataclass(frozen=True, eq=False)
class Program:
    """A graph, which of its inputs are parameters, and what follows from that."""

    graph: torch.fx.Graph
    parameters: frozenset[Node]
    rules: AxisRules

    @cached_property
    def order(self) -> Mapping[Node, int]:
        return {node: i for i, node in enumerate(self.graph.nodes)}

    @cached_property
    def axes(self) -> AxisMap:
        return name_axes(self.graph, self.rules)

    @cached_property
    def learned(self) -> frozenset[Node]:
        """Values that depend on parameters and on nothing that the user passes."""
        return learned_values(self.graph, self.parameters)

    @cached_property
    def feature_axes(self) -> frozenset[int]:
        """Axes of channels, as products with parameters tell."""
        return feature_axes(self.axes, self.learned)

    @cached_property
    def parameter_axes(self) -> frozenset[int]:
        """Axes of parameters: head dims, hidden sizes, and learned positions."""
        return frozenset(a for p in self.parameters for dim in self._dims(p) for a in dim)

    @cached_property
    def input_axes(self) -> frozenset[int]:
        """Axes that are by themselves a dimension of something that the user passes."""
        inputs = [n for n in self.graph.find_nodes(op="placeholder") if n not in self.parameters]
        return frozenset(dim[0] for n in inputs for dim in self._dims(n) if len(dim) == 1)

    def _dims(self, node: Node) -> tuple[Dim, ...]:
        return self.axes.dims(node) if node in self.axes.values else ()
