"""Values that a plan keeps in the host's memory, in the programs that are compiled.

The local program has a mark behind each. In the joint program of forward and backward the mark goes
away, and what it marks is what torch moves; where torch would not move that (an item of several
results, a view), a copy of it takes its place in backward.
"""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy

from ringfx.ir.markers import OFFLOADED
from ringfx.ops.offload import offloaded
from ringfx.ops.operator import __file__ as operator_file
from ringfx.torch_compat.inductor import CustomGraphPass, hash_of_files
from ringfx.torch_compat.offloading import is_view, should_move

__all__ = ["MoveOffloaded", "has_offloaded", "mark_offloaded", "move_offloaded"]


def mark_offloaded(graph: Graph) -> None:
    """Put a mark behind each value of a local program that its plan offloads."""
    for node in list(graph.nodes):
        is_tensor = isinstance(node.meta.get("val"), torch.Tensor)
        if not (node.meta.get(OFFLOADED) and is_tensor and node.op == "call_function"):
            continue
        with graph.inserting_after(node):
            mark = graph.call_function(offloaded, (node,))
        mark.meta = {k: v for k, v in node.meta.items() if k != OFFLOADED}
        mark.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        node.replace_all_uses_with(mark, delete_user_cb=lambda user, own=mark: user is not own)


def has_offloaded(gm: GraphModule) -> bool:
    return bool(gm.graph.find_nodes(op="call_function", target=offloaded))


def move_offloaded(graph: Graph) -> None:
    """In a joint program: marks become what torch moves."""
    for mark in graph.find_nodes(
        op="call_function", target=torch.ops.ringfx.offloaded.default, sort=True
    ):
        value = mark.args[0]
        assert isinstance(value, Node)
        kept = value if _may_move(value) else _copied(value, mark, graph)
        mark.replace_all_uses_with(kept)
        graph.erase_node(mark)
        for alias in [n for n in kept.users if n.target is torch.ops.aten.detach.default]:
            alias.replace_all_uses_with(kept)  # else torch keeps it, and moves nothing
            graph.erase_node(alias)
        kept.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        kept.meta["ac_graph_id"] = mark.meta.get("ac_graph_id", 0)
        should_move(kept)


def _may_move(value: Node) -> bool:
    is_own = value.op == "call_function" and value.target is not operator.getitem
    return is_own and not is_view(value) and value.meta["val"].is_contiguous()


def _copied(value: Node, mark: Node, graph: Graph) -> Node:
    with graph.inserting_after(value):
        copied = graph.call_function(
            torch.ops.aten.clone.default, (value,), {"memory_format": torch.contiguous_format}
        )
    copied.meta = dict(mark.meta)
    value.replace_all_uses_with(copied, delete_user_cb=lambda user: user not in (copied, mark))
    return copied


class MoveOffloaded(CustomGraphPass):
    """For Inductor."""

    def __call__(self, graph: Graph) -> None:
        move_offloaded(graph)

    def uuid(self) -> Any:
        # What a program may hold that was compiled before: Inductor trusts what operators promised.
        return hash_of_files((str(Path(__file__)), str(Path(operator_file))))
