"""Calls of ringfx's own operator that the user's model makes, such as ``ringfx.nn``'s layers.

They are in canonical form as they stand: only the strategy, the layout and the group are open.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, Node

from ringfx.errors import InvalidArgument
from ringfx.ops import attention
from ringfx.passes.axes.call import Call
from ringfx.passes.capture.origin import describe_node
from ringfx.passes.exprs.emitter import Emitter
from ringfx.strategies import DEFAULT

__all__ = ["written_calls"]


def written_calls(graph: Graph) -> tuple[Node, ...]:
    """Puts the canonical function in the place of each call of the operator."""
    found: list[Node] = []
    for old in graph.find_nodes(op="call_function", target=torch.ops.ringfx.attention.default):
        call = Call(old)
        if call["group"]:
            raise InvalidArgument(
                f"{describe_node(old)}: this attention is written for {call['group']!r}, a group "
                "of ranks, and stands in a model that ringfx.optimize splits: its tokens would be "
                "split twice. Do: write it for one rank, as ringfx.nn's layers do, or leave the "
                "model as it is."
            )
        emit = Emitter(graph, old)
        new = emit.call(
            attention, *old.args[:4], spec=call["spec"], strategy=DEFAULT,
            layout="contiguous", group="", name=old.meta.get("ringfx_path", ""),
            value=old.meta["val"][0],
        )  # fmt: skip
        for result in list(old.users):
            if result.target is not operator.getitem or result.args[1] != 0:
                raise InvalidArgument(
                    f"{describe_node(old)}: the logsumexp of this attention is read, which has no "
                    "gradient. Do: read its output only."
                )
            result.replace_all_uses_with(new)
            graph.erase_node(result)
        graph.erase_node(old)
        found.append(new)
    return tuple(found)
