"""Which values a gradient flows through: decides where communication needs a transpose."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ringfx.torch_compat.autograd import SET_GRAD_ENABLED

__all__ = ["mark", "needs_grad", "receives_grad", "stamp_gradients"]

_KEY = "ringfx_needs_grad"
_NOT_DIFFERENTIABLE = frozenset({torch.ops.aten.detach.default})


def needs_grad(node: torch.fx.Node) -> bool:
    return bool(node.meta.get(_KEY, False))


def mark(node: torch.fx.Node, enabled: bool) -> None:
    """Note whether a value has a gradient, given whether gradients are on and its operands' marks.

    A placeholder's own need is ``enabled``.
    """
    node.meta[_KEY] = enabled and (node.op == "placeholder" or _differentiable(node))


def stamp_gradients(graph: torch.fx.Graph, inputs_need: Sequence[bool]) -> None:
    """Mark every value that depends on a trainable input while gradients were enabled."""
    enabled = torch.is_grad_enabled()
    needed = iter(inputs_need)
    for node in graph.nodes:
        if node.op == "placeholder":
            mark(node, next(needed) and enabled)
            continue
        if node.target is SET_GRAD_ENABLED:
            enabled = bool(node.args[0])
        mark(node, enabled)


def receives_grad(graph: torch.fx.Graph) -> frozenset[torch.fx.Node]:
    """Values that a gradient of some result can come back to.

    A parameter that only an ``argmax`` reads needs a gradient and gets none: its ``grad`` stays
    None, which an optimizer with weight decay takes for something else than zero.
    """
    found: set[torch.fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or node in found:
            found |= {n for n in node.all_input_nodes if needs_grad(n)}
    return frozenset(found)


def _differentiable(node: torch.fx.Node) -> bool:
    if node.op != "call_function" or node.target in _NOT_DIFFERENTIABLE:
        return False
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor) and not (value.is_floating_point() or value.is_complex()):
        return False
    return any(needs_grad(n) for n in node.all_input_nodes)
