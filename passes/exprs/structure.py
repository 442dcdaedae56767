"""Equal computations of one program: 80 layers that each build the same mask build one."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch.fx import Graph, Node

from ringfx.passes.capture.gradients import needs_grad
from ringfx.torch_compat.operators import OpOverload, schema_of

__all__ = ["first_of_equals"]


def first_of_equals(graph: Graph) -> Mapping[Node, Node]:
    """For each value the first one that is computed in the same way from the same values."""
    firsts: dict[Hashable, Node] = {}
    found: dict[Node, Node] = {}
    for node in graph.nodes:
        found[node] = firsts.setdefault(_key(node, found), node)
    return found


def _key(node: Node, found: Mapping[Node, Node]) -> Hashable:
    op = node.target
    if node.op == "get_attr":
        return ("get_attr", op)
    if node.op != "call_function" or not isinstance(op, OpOverload):
        return node
    if schema_of(op).is_mutable or torch.Tag.nondeterministic_seeded in op.tags:
        return node
    try:
        key = (op, needs_grad(node), _frozen(node.args, found), _frozen(node.kwargs, found))
        hash(key)
    except TypeError:
        return node
    return key


def _frozen(value: Any, found: Mapping[Node, Node]) -> Hashable:
    if isinstance(value, Node):
        return found[value]
    if isinstance(value, (tuple, list)):
        return tuple(_frozen(v, found) for v in value)
    if isinstance(value, Mapping):
        return tuple((k, _frozen(v, found)) for k, v in value.items())
    return (type(value), value)  # 1, 1.0 and True are equal in Python
