"""Attention of few queries over many keys: pooling, class attention, latents, landmarks, objects.

Its queries are replicated and its keys stay sharded: what ranks merge is as long as the queries,
where strategies of sharded queries move all keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Node

from ringfx.passes.axes.rules.views import RULES as VIEWS

__all__ = ["has_few_queries"]

aten = torch.ops.aten
FEWER = 4
"""By so much queries, over their heads, are fewer than keys: merging sends and sums the output,
where a ring sends K and V once, and less of it waits."""


def has_few_queries(attention: Node) -> bool:
    """Whether every rank is to have all queries of a canonical attention.

    Not of one step of a decoder, whose keys are kept for the next step: a rank that has its own
    ones alone must gather them there.
    """
    q, k = (n.meta["val"].shape for n in attention.args[:2])  # type: ignore[union-attr]
    few = FEWER * int(q[1]) * int(q[2]) <= int(k[1]) * int(k[2])
    return few and not _are_kept(attention)


def _are_kept(attention: Node) -> bool:
    """Whether keys that the program is given, perhaps with more of them, are a result of it."""
    results = set(attention.graph.output_node().all_input_nodes)
    for operand in attention.args[1:3]:
        assert isinstance(operand, Node)
        moved = list(_moved(operand))
        if not results.isdisjoint(moved) and any(n.op == "placeholder" for n in moved):
            return True
    return False


def _moved(value: Node) -> Iterator[Node]:
    """The value, and all that it is put together of without being computed."""
    seen, left = set[Node](), [value]
    while left:
        node = left.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        if node.target in VIEWS or node.target in _WRITES:
            left += node.all_input_nodes


_WRITES = frozenset({
    aten.index_put.default, aten.index_copy.default, aten.slice_scatter.default,
    aten.select_scatter.default, aten.scatter.src, aten.clone.default, aten.to.dtype,
    aten._to_copy.default, aten.contiguous.default, aten.where.self,
})  # fmt: skip
