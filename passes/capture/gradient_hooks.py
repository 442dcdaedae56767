"""``Tensor.register_hook``: a function of a value's gradient, kept as an identity's own backward.

A hook sees the sum of the gradients of all uses of its tensor, earlier ones too. So the identity
stands before the first of them, and all of them read its result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from ringfx.errors import CaptureRefused
from ringfx.passes.capture.origin import describe_node
from ringfx.passes.capture.own_backward import OwnBackward
from ringfx.passes.capture.precision import Autocast
from ringfx.torch_compat.operators import HigherOrderOperator

__all__ = ["HOOK", "hooked", "move_hooks"]

HOOK = "register_hook"
"""The name of Dynamo's operator: ``register_hook(x, function, *captured)`` is x."""


def move_hooks(gm: GraphModule) -> None:
    """Put every hook before the first use of the value whose gradient it takes.

    Of several hooks on one value the last stands first: gradients pass them in the order in which
    they were registered.

    Raises
    ------
    CaptureRefused
        A hook reads what is computed later than an earlier use of its value.
    """
    for module in [m for m in gm.modules() if isinstance(m, GraphModule)]:
        order = {node: i for i, node in enumerate(module.graph.nodes)}
        hooks = [node for node in order if _is_hook(node)]
        for node in hooks:
            _move(node, order)
        if hooks:
            module.recompile()


def _is_hook(node: Node) -> bool:
    return isinstance(node.target, HigherOrderOperator) and node.target.name() == HOOK


def _move(node: Node, order: Mapping[Node, int]) -> None:
    value, function, *captured = node.args
    assert isinstance(value, Node)
    assert isinstance(function, Node)
    node.replace_all_uses_with(value)
    while _is_hook(value):
        assert isinstance(value.args[0], Node)
        value = value.args[0]
    first = min((u for u in value.users if u in order), key=order.__getitem__)
    if any(order[x] >= order[first] for x in captured if isinstance(x, Node)):
        raise CaptureRefused(
            f"{describe_node(node)}: a gradient hook reads a value that is computed after the "
            "tensor's first use. Do: register the hook where the tensor is made."
        )
    if first is not node:
        first.prepend(function)
        first.prepend(node)
    value.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
    node.args = (value, function, *captured)


def hooked(x: torch.Tensor, function: GraphModule, captured: Sequence[Any]) -> Any:
    """x, whose gradient the function changes."""
    result: Any = function.graph.output_node().args[0]
    if result is None:  # it only looks
        return x
    options = {
        "non_differentiable_idx": [],
        "saved_for_backward_idx": list(range(len(captured))),
    }
    forward, backward = _identity(len(captured)), _gradient(function, len(captured))
    return OwnBackward(forward, backward, options, Autocast.now())(x, *captured)[0]


def _identity(num_captured: int) -> GraphModule:
    graph = Graph()
    x, *captured = (graph.placeholder(f"x{i}") for i in range(1 + num_captured))
    graph.output(((graph.call_method("view_as", (x, x)),), tuple(captured)))
    return GraphModule(torch.nn.Module(), graph)


def _gradient(function: GraphModule, num_captured: int) -> GraphModule:
    """(gradient, captured) -> the gradient of x, none of what is captured."""
    graph = Graph()
    result = graph.graph_copy(function.graph, {})
    changed = result[0] if isinstance(result, (tuple, list)) else result
    graph.output((changed, *[None] * num_captured))
    return GraphModule(function, graph)
