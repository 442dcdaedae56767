"""Keeps Inductor from fusing attention that ringfx declined.

Inductor recognises attention in products and softmaxes by patterns of its own, and gets an unusual
order of K's dimensions silently wrong where their sizes agree (pytorch #195320). Ringfx declines a
region for a reason, so the region must be compiled as it is written. While Inductor matches
patterns, an identity (``fusion_barrier``) follows every batched product; it is removed afterwards.
The compiled program differs in the fusion only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph

from ringfx.torch_compat.inductor import CustomGraphPass, hash_of_files

__all__ = ["InsertBarriers", "RemoveBarriers"]

aten = torch.ops.aten
_PRODUCTS = frozenset({aten.bmm.default, aten.baddbmm.default})


@torch.library.custom_op("ringfx::fusion_barrier", mutates_args=())
def _fusion_barrier(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@_fusion_barrier.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


_FUSION_BARRIER = torch.ops.ringfx.fusion_barrier.default


class InsertBarriers(CustomGraphPass):
    """Inserts a barrier after every batched product."""

    def __call__(self, graph: Graph) -> None:
        for node in list(graph.nodes):
            if node.target in _PRODUCTS:
                with graph.inserting_after(node):
                    new = graph.call_function(_FUSION_BARRIER, (node,))
                new.meta = dict(node.meta)
                node.replace_all_uses_with(
                    new, delete_user_cb=lambda user, new=new: user is not new
                )

    def uuid(self) -> Any:
        return hash_of_files((__file__,))


class RemoveBarriers(CustomGraphPass):
    """Removes the barriers."""

    def __call__(self, graph: Graph) -> None:
        for node in list(graph.nodes):
            if node.target is _FUSION_BARRIER:
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)

    def uuid(self) -> Any:
        return hash_of_files((__file__,))
