"""Small clean-ups that hold for any program: they remove what would only confuse later passes."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

__all__ = ["simplify"]

aten = torch.ops.aten


def simplify(gm: torch.fx.GraphModule) -> None:
    for node in list(gm.graph.nodes):
        if node.target is aten.cat.default:
            _drop_empty_parts(node)
    _eliminate_dead(gm.graph)
    gm.graph.lint()


def _drop_empty_parts(node: Node) -> None:
    """cat skips legacy 1-D tensors of no elements (a cache that holds nothing yet)."""
    parts: Any = node.args[0]
    kept = [p for p in parts if p.meta["val"].numel() > 0]
    same_dtype = kept and kept[0].meta["val"].dtype == node.meta["val"].dtype
    if len(kept) == 1 and same_dtype:
        node.replace_all_uses_with(kept[0])
    elif kept:
        node.args = (kept, *node.args[1:])


def _eliminate_dead(graph: torch.fx.Graph) -> None:
    """Remove values that nothing reads; random operators stay, they advance the generator."""

    def impure(node: Node) -> bool:
        if node.op in ("placeholder", "output") or node.target is torch._C._set_grad_enabled:
            return True
        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags:
            return True
        return node.op == "call_function" and not isinstance(node.target, torch._ops.OpOverload)

    graph.eliminate_dead_code(impure)
