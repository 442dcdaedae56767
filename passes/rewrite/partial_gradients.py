"""Values of every token whose gradient is summed as it is cut: a reduce-scatter, no all-reduce.

The backward of torch's operators is linear in the gradients that come in. So where all that read a
value of every token (``ringfx.ir.markers.every_token``), or what is computed from it alone, give a
part of its gradient each, these parts go back as they are. The gather that made the value adds them
up and gives each rank its tokens: half of what an all-reduce before it would move.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

from torch.fx import Graph, Node

from ringfx.ir.markers import every_token
from ringfx.passes.axes.call import result_values
from ringfx.passes.capture.gradients import needs_grad
from ringfx.passes.place import PlacementMap
from ringfx.passes.split_modes import Placement
from ringfx.torch_compat.operators import OpOverload

__all__ = ["of_partial_gradient"]


def of_partial_gradient(graph: Graph, placement: PlacementMap) -> frozenset[Node]:
    """The replicated values, made of values of every token alone or only for them, of whose
    gradient each rank's users give a part."""
    found: set[Node] = set()
    for node, is_made in reversed(list(_replicated(graph, placement))):
        users = [user for user in node.users if user.users or user.op == "output"]
        is_part = all(user in found or _gives_part(placement, user, node) for user in users)
        if is_part and (is_made or not found.isdisjoint(node.users)):
            found.add(node)
    return frozenset(found)


def _replicated(graph: Graph, placement: PlacementMap) -> Iterator[tuple[Node, bool]]:
    """Values of every token, what is computed from them or from what is gathered at once; and
    whether it is made of the former."""
    made: dict[Node, bool] = {}
    for node in graph.nodes:
        is_linear = str(node.target).startswith("aten.") or node.target is operator.getitem
        trained = [n for n in node.all_input_nodes if needs_grad(n)]
        gathered = [n for n in trained if placement.is_sharded(n) and _size(n) <= _size(node)]
        is_alone = is_linear and trained and all(n in made or n in gathered for n in trained)
        if node not in placement.modes and (node.target is every_token or is_alone):
            made[node] = node.target is every_token or all(made.get(n, False) for n in trained)
            yield node, made[node]


def _size(node: Node) -> int:
    return sum(value.numel() for value in result_values(node))


def _gives_part(placement: PlacementMap, user: Node, value: Node) -> bool:
    """Whether a call takes it as replicated, with this rank's part of its gradient."""
    mode = placement.modes.get(user)
    if mode is None or not isinstance(user.target, OpOverload):  # attention may take rows of it
        return False
    operands = placement.lines.axes.ops[user].call.operands
    taken = {p for n, p in zip(operands, mode.operands, strict=True) if n is value}
    return taken == {Placement.REPLICATED_PARTIAL_GRAD}
