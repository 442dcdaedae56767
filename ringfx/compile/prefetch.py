"""Messages of sharded states travel while the program computes.

In the programs that autograd's partitioner makes (a forward and a backward), each gather of
parameters begins just before the one before it is waited for, so that it travels while the
parameters of that one are used; and each sum of gradients is waited for after the next has begun.
Two of each are under way at most, which bounds their memory. The next message becomes an argument
(``after``) of the operator that waits: compilers that reorder a program keep that order.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch.fx import Graph, Node

from ringfx.comm import state_messages  # defines the operators
from ringfx.torch_compat.inductor import CustomGraphPass, hash_of_files
from ringfx.torch_compat.operators import OpOverload, schema_of

__all__ = ["OverlapStates", "overlap_states"]

assert state_messages.finish_gather
_OPS = torch.ops.ringfx


def overlap_states(graph: Graph) -> None:
    """Move the messages of one program; what it computes stays the same."""
    for this, following in pairwise(_waits(graph, _OPS.finish_gather.default)):
        _begin_before(this, following.args[0])
    for this, following in pairwise(_waits(graph, _OPS.finish_scatter.default)):
        _wait_after(this, following.args[0])


def _waits(graph: Graph, operator: Any) -> list[Node]:
    return graph.find_nodes(op="call_function", target=operator)


def _begin_before(wait: Node, begin: Any) -> None:
    """The next gather begins, with what it sends, before this one is waited for."""
    position = _positions(wait.graph)
    found: set[Node] = set()
    new = [begin]
    while new:
        node = new.pop()
        if position[node] > position[wait] and node not in found:
            found.add(node)
            new += node.all_input_nodes
    if any(map(_is_fixed, found - {begin})):
        return
    for node in sorted(found, key=position.__getitem__):
        wait.prepend(node)
    _put_after(wait, begin)


def _wait_after(wait: Node, begin: Any) -> None:
    """A sum is waited for, and read, once the next has begun."""
    position = _positions(wait.graph)
    found: set[Node] = set()
    new = [wait]
    while new:
        node = new.pop()
        if position[node] < position[begin] and node not in found:
            found.add(node)
            new += node.users
        elif node is begin:  # it sends what this one brings
            return
    if any(map(_is_fixed, found - {wait})):
        return
    for node in sorted(found, key=position.__getitem__, reverse=True):
        begin.append(node)
    _put_after(wait, begin)


def _positions(graph: Graph) -> Mapping[Node, int]:
    return {node: i for i, node in enumerate(graph.nodes)}


def _is_fixed(node: Node) -> bool:
    """Whether it stays in its place: it draws random numbers, writes, or sends."""
    if not isinstance(node.target, OpOverload):
        return node.op != "call_function"
    is_random = torch.Tag.nondeterministic_seeded in node.target.tags
    return is_random or node.target.namespace == "ringfx" or schema_of(node.target).is_mutable


def _put_after(wait: Node, begin: Node) -> None:
    *others, after = wait.args
    wait.args = (*others, [*after, begin])  # type: ignore[misc]


class OverlapStates(CustomGraphPass):
    """For Inductor."""

    def __call__(self, graph: Graph) -> None:
        overlap_states(graph)

    def uuid(self) -> Any:
        return hash_of_files((__file__,))
