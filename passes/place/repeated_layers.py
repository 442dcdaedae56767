"""Repeated layers are decided once: calls that stand alike in numbered modules are one vertex.

Two calls are alike if they stand at the same place of modules that differ in their numbers only
(``model.layers.7.mlp`` and ``model.layers.8.mlp``), cost and may do the same, and so do the calls
around them, a few steps far in both directions. Deciding them as one is legal whatever they are, as
each decision that the merged network allows is one that the network itself allows; that it is the
cheapest too is what the steps are for: what feeds or reads a layer in an unusual way makes it, and
its neighbourhood, a class of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping

from torch.fx import Graph, Node

__all__ = ["alike"]

STEPS = 4
"""How far around itself a call is compared."""


def alike(graph: Graph, describe: Callable[[Node], Hashable]) -> Mapping[Node, str]:
    """For each node the name of the first one that is decided with it: mostly its own."""
    nodes = list(graph.nodes)
    colours = _numbered({n: (_place(n), describe(n)) for n in nodes})
    for _ in range(STEPS):
        colours = _numbered(
            {
                n: (
                    colours[n],
                    tuple(colours[i] for i in n.all_input_nodes),
                    tuple(sorted(colours[u] for u in n.users)),
                )
                for n in nodes
            }
        )
    first: dict[int, str] = {}
    return {n: first.setdefault(colours[n], n.name) for n in nodes}


def _place(node: Node) -> Hashable:
    """The module with its numbers left out; what stands in none that is numbered is alone.

    Inputs differ by what uses them.
    """
    if node.op == "placeholder":
        return node.op
    path = node.meta.get("ringfx_path", "")
    pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)
    return (node.target, pattern) if pattern != path else node.name


def _numbered(keys: Mapping[Node, Hashable]) -> dict[Node, int]:
    numbers: dict[Hashable, int] = {}
    return {n: numbers.setdefault(key, len(numbers)) for n, key in keys.items()}
