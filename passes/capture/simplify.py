"""Small clean-ups that hold for any program: they remove what would only confuse later passes."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from ringfx.passes.capture.gradients import needs_grad
from ringfx.torch_compat.operators import OpOverload

__all__ = ["eliminate_dead", "simplify"]

aten = torch.ops.aten


def simplify(gm: torch.fx.GraphModule) -> None:
    for node in list(gm.graph.nodes):
        if node.target is aten.cat.default:
            _drop_empty_parts(node)
        if node.target is aten.view.default:
            # Strides are not kept: an attention's result is contiguous, whatever the kernel's was,
            # and a `contiguous()` that had nothing to do left no trace.
            node.target = aten.reshape.default
    eliminate_dead(gm.graph)
    gm.graph.lint()


def _drop_empty_parts(node: Node) -> None:
    """cat skips legacy 1-D tensors of no elements (a cache that holds nothing yet).

    A trained part of no elements stays: its gradient, of no elements too, is there to be found.
    """
    parts: Any = node.args[0]
    dims = node.meta["val"].dim()
    kept = [
        p
        for p in parts
        if p.meta["val"].numel() > 0 or (p.meta["val"].dim() == dims and needs_grad(p))
    ]
    dtype = node.meta["val"].dtype
    if len(kept) == 1 and kept[0].meta["val"].dtype == dtype:
        node.replace_all_uses_with(kept[0])
    elif len(kept) == 1:  # the empty part only promotes the type (autocast: float32 and bfloat16)
        node.target, node.args = aten.to.dtype, (kept[0], dtype)
    elif kept and all(p.meta["val"].dtype == dtype for p in kept):
        node.args = (kept, *node.args[1:])


def eliminate_dead(graph: torch.fx.Graph) -> None:
    """Remove values that nothing reads; random operators stay, they advance the generator."""

    def impure(node: Node) -> bool:
        if node.op in ("placeholder", "output"):
            return True
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            return True
        home = getattr(node.target, "__module__", None) or ""
        if home == "ringfx.comm.random_draws":
            return True
        ours = home.startswith("ringfx") or node.target is operator.getitem
        is_op = isinstance(node.target, OpOverload)
        return node.op == "call_function" and not (is_op or ours)

    graph.eliminate_dead_code(impure)
