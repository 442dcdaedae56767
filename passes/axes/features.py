"""Which axes are features: those that a product with something learned makes, or sums over.

A table of positions is learned too, but it is added: its tokens are no features therefore.
"""

from __future__ import annotations

from collections.abc import Collection

import networkx as nx
import torch
from torch.fx import Graph, Node

from ringfx.passes.axes.propagate import AxisMap, NamedOp
from ringfx.passes.axes.rules import contraction

__all__ = ["feature_axes", "learned_values"]

LOOKUPS = frozenset({torch.ops.aten.embedding.default})


def learned_values(graph: Graph, held: Collection[Node]) -> frozenset[Node]:
    """Values that depend on what modules hold and on nothing that the user passes."""
    found = set(held)
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if inputs and found.issuperset(inputs):
            found.add(node)
    return frozenset(found)


def feature_axes(axes: AxisMap, learned: Collection[Node]) -> frozenset[int]:
    found = {
        atom
        for node, named in axes.ops.items()
        if node.target in contraction.RULES or node.target in LOOKUPS
        for name in _features(named, learned)
        for atom in axes.label(node, name)
    }
    return frozenset(_with_windows(axes, found))


def _with_windows(axes: AxisMap, features: set[int]) -> set[int]:
    """Also those that are a slice of them (queries, keys and values of one layer), or around it."""
    graph = nx.Graph()
    for window in axes.windows:
        graph.add_edge(axes.space.resolve(window.source), axes.space.resolve(window.result))
    for kin in nx.connected_components(graph):
        if any(dim and features.issuperset(dim) for dim in kin):
            features |= {atom for dim in kin for atom in dim}
    return features


def _features(named: NamedOp, learned: Collection[Node]) -> set[str]:
    """The labels of one product that only what is learned brings, or that are summed with it."""
    weights, given = set[str](), set[str]()
    for operand, labels in zip(named.call.operands, named.axes.operands, strict=True):
        names = {x for dim in labels or () for x in dim}
        if operand in learned:
            weights |= names
        else:
            given |= names
    if not weights or not given:
        return set()
    made = {x for labels in named.axes.results for dim in labels for x in dim}
    channels = {"c"} & given if "w" in weights else set()  # of a convolution, perhaps in groups
    return ((weights - given) & made) | ((weights & given) - made) | channels
