"""Keeps Inductor from fusing attention that ringfx left as it stands.

Inductor recognises attention in products and softmaxes by patterns of its own, and gets an unusual
order of K's dimensions wrong where their sizes agree (pytorch #195320), silently. What ringfx
declined was declined with a reason, so it is compiled as it is written: while Inductor looks for
patterns an identity stands behind every batched product, and is taken out again afterwards. The
compiled program is the same but for the fusion.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Graph

from ringfx.torch_compat.inductor import CustomGraphPass, config, hash_of_files

__all__ = ["unfused"]

aten = torch.ops.aten
_PRODUCTS = frozenset({aten.bmm.default, aten.baddbmm.default})


@torch.library.custom_op("ringfx::apart", mutates_args=())
def _apart(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@_apart.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


_IDENTITY = torch.ops.ringfx.apart.default


class _Separate(CustomGraphPass):
    """Puts an identity behind every batched product."""

    def __call__(self, graph: Graph) -> None:
        for node in list(graph.nodes):
            if node.target in _PRODUCTS:
                with graph.inserting_after(node):
                    new = graph.call_function(_IDENTITY, (node,))
                new.meta = dict(node.meta)
                node.replace_all_uses_with(
                    new, delete_user_cb=lambda user, new=new: user is not new
                )

    def uuid(self) -> Any:
        return hash_of_files((__file__,))


class _Join(CustomGraphPass):
    """Takes the identities out again."""

    def __call__(self, graph: Graph) -> None:
        for node in list(graph.nodes):
            if node.target is _IDENTITY:
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)

    def uuid(self) -> Any:
        return hash_of_files((__file__,))


def unfused() -> Mapping[str, Any]:
    """Settings of Inductor for one compilation, beside the user's own passes."""
    return {
        "joint_custom_pre_pass": _beside(config.joint_custom_pre_pass, _Separate()),
        "joint_custom_post_pass": _beside(config.joint_custom_post_pass, _Join()),
    }


def _beside(users: Any, ours: CustomGraphPass) -> Any:
    if users is None:
        return ours
    return [*(users if isinstance(users, (list, tuple)) else (users,)), ours]
