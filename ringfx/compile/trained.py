"""Which tensors results depend on with gradients, by walking the autograd graph."""

from __future__ import annotations

from typing import Any

import torch

from ringfx.torch_compat.pytree import tree_leaves

__all__ = ["leaves_of_graph"]


def leaves_of_graph(results: Any) -> list[torch.Tensor]:
    """The leaf tensors that a backward of the results would give gradients to, each once."""
    left = [x.grad_fn for x in tree_leaves(results) if isinstance(x, torch.Tensor)]
    seen: set[Any] = set()
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        left += [source for source, _ in node.next_functions]
    found = (getattr(node, "variable", None) for node in seen)
    return [x for x in found if x is not None]
