"""Logsumexps of scores that are read beside their softmax: gates by a sink, z-losses, merges.

A split attention returns no logsumexp. So who reads one gets scores of its own, a second product on
gathered tokens, and the attention is left with scores that nobody else reads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence

import torch
from torch.fx import Graph, Node

from ringfx.passes.detect.walk import walk_to_products

__all__ = ["part_logsumexps"]

aten = torch.ops.aten
_SOFTMAXES = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
_LOOKED_AT = 64
"""Calls looked at behind scores for their softmax."""


def part_logsumexps(graph: Graph, parameters: frozenset[Node]) -> None:
    """Give every logsumexp beside a softmax a copy of the calls that make their scores."""
    for node in graph.find_nodes(op="call_function", target=aten.logsumexp.default):
        scores = node.args[0]
        assert isinstance(scores, Node)
        order = {n: i for i, n in enumerate(graph.nodes)}
        behind = walk_to_products(scores, parameters)
        made = behind.inside(behind.products, order)
        if scores not in made or any(map(_is_random, made)):
            continue
        others = {u for n in made for u in n.users} - {*made, node}
        if _softmaxes_behind(others) and not _is_shift(node, scores):
            _copy(graph, node, scores, made)


def _is_random(node: Node) -> bool:
    """Whether a copy of a call would draw other numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _is_shift(node: Node, scores: Node) -> bool:
    """Whether it is a part of a softmax: what is taken off its own scores."""
    subtractions = [u for u in scores.users if u.target is aten.sub.Tensor]
    return any(u.args[0] is scores and _comes_from(u.args[1], node) for u in subtractions)


def _comes_from(value: object, node: Node) -> bool:
    while isinstance(value, Node) and value is not node:
        value = value.args[0] if len(value.all_input_nodes) == 1 else None
    return value is node


def _softmaxes_behind(values: Collection[Node]) -> bool:
    queue, seen = deque(values), set(values)
    while queue and len(seen) < _LOOKED_AT:
        current = queue.popleft()
        if current.target in _SOFTMAXES:
            return True
        more = [u for u in current.users if u not in seen]
        seen.update(more)
        queue.extend(more)
    return False


def _copy(graph: Graph, reader: Node, scores: Node, made: Sequence[Node]) -> None:
    copied: dict[Node, Node] = {}
    with graph.inserting_before(reader):
        for node in made:
            copied[node] = graph.node_copy(node, lambda n: copied.get(n, n))
    reader.replace_input_with(scores, copied[scores])
    for node in reversed(made):
        if not node.users:  # the logsumexp's alone already
            graph.erase_node(node)
