"""Attention that stays written out, each rank with the rows of its own queries; where queries are
few and keys many, with the columns of its own keys; where channels attend, with its own tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch.fx import Graph, Node

from ringfx.ir.values import Declined
from ringfx.passes.axes import AxisMap
from ringfx.passes.axes.call import result_values
from ringfx.passes.detect.candidate import decline
from ringfx.passes.detect.channels import CHANNELS
from ringfx.passes.place.min_cut import PlacementMap
from ringfx.passes.token_axes.row_maps import is_product, weighings
from ringfx.passes.token_axes.token_line import TokenDim
from ringfx.units.format import format_bytes

__all__ = ["by_channels", "by_columns", "by_rows"]

NO_SOFTMAX = "its scores reach its values by no softmax of products of queries with keys"


def by_rows(
    graph: Graph, placement: PlacementMap, explained: Sequence[Declined]
) -> tuple[Declined, ...]:
    """The attentions of which each rank computes whole rows of scores, [S / p, S], with why.

    One that is explained already, as declined or as missed, is given as that entry, with more to
    say. At one rank those that several would split.
    """
    lines = placement.lines
    ranks = _ranks(placement)
    split = {
        product: weights
        for product, weights in weighings(graph, lines)
        if ranks == 1 or placement.is_sharded(product)
    }
    known = _explained(graph, lines.axes, split, explained)
    found = {product: entry for (product, _), entry in known.items()}
    whose = "the rows of its own queries" if ranks > 1 else "all rows"
    keys = "and all of its keys and values"
    return tuple(
        _said(found.get(product) or decline(product, NO_SOFTMAX), weights, ranks, whose, keys)
        for product, weights in split.items()
    )


def by_columns(
    graph: Graph, placement: PlacementMap, explained: Sequence[Declined]
) -> tuple[Declined, ...]:
    """Of what is explained as declined or as missed, the attentions whose weights lie with the
    tokens of their keys, [Q, S / p]: each is given with more to say."""
    axes, ranks = placement.lines.axes, _ranks(placement)
    products = {
        node
        for node in graph.nodes
        if is_product(axes, node)
        and any(_is_summed(placement, node, n) for n in axes.ops[node].call.operands)
    }
    whose, keys = "the columns of its own keys", "whose sums go over the ranks"
    return tuple(
        _said(entry, weights, ranks, whose, keys)
        for (product, weights), entry in _explained(graph, axes, products, explained).items()
        if _is_summed(placement, product, weights)
    )


def by_channels(
    graph: Graph, placement: PlacementMap, explained: Sequence[Declined]
) -> tuple[Declined, ...]:
    """Of what is declined because channels attend, what each rank computes for its own tokens."""
    nodes, ranks = {n.name: n for n in graph.nodes}, _ranks(placement)
    found = []
    for entry in explained:
        product = nodes.get(entry.node)
        if (
            entry.reason != CHANNELS
            or product is None
            or not is_product(placement.lines.axes, product)
        ):
            continue
        operands = placement.lines.axes.ops[product].call.operands
        weights = next((n for n in operands if not placement.is_sharded(n)), None)
        if ranks > 1 and weights is not None and placement.is_sharded(product):
            found.append(_said(entry, weights, 1, "all", "and its own tokens of the rest"))
    return tuple(found)


def _ranks(placement: PlacementMap) -> int:
    return max((line.layout.world_size for line in placement.lines.lines), default=1)


def _is_summed(placement: PlacementMap, product: Node, weights: Node) -> bool:
    """Whether each rank sums over its own tokens, which are no rows of the weights."""
    tokens = placement.lines.token_dim(weights)
    dims = placement.lines.axes.dims(product)
    is_part = product in placement.modes and placement.is_sharded(weights)
    return is_part and isinstance(tokens, TokenDim) and tokens.member.axis not in dims


def _explained(
    graph: Graph, axes: AxisMap, products: Collection[Node], explained: Sequence[Declined]
) -> dict[tuple[Node, Node], Declined]:
    """For products and the weights that they use, what is known of these."""
    nodes = {n.name: n for n in graph.nodes}
    found: dict[tuple[Node, Node], Declined] = {}
    for entry in explained if products else ():
        at = _weighing(nodes[entry.node], products, axes) if entry.node in nodes else None
        if at is not None:
            found.setdefault(at, entry)
    return found


def _weighing(start: Node, products: Collection[Node], axes: AxisMap) -> tuple[Node, Node] | None:
    """The product that uses the weights that are made there, and the weights; other products may
    mix their heads."""
    waiting, before = deque([start]), {start: start}
    while waiting:
        node = waiting.popleft()
        if node in products:
            return node, before[node]
        if node is start or not (is_product(axes, node) and _count(node) != _count(start)):
            fresh = [user for user in node.users if user not in before]
            before |= dict.fromkeys(fresh, node)
            waiting.extend(fresh)
    return None


def _count(node: Node) -> int:
    return max((value.numel() for value in result_values(node)), default=0)


def _said(entry: Declined, weights: Node, ranks: int, whose: str, further: str) -> Declined:
    value: torch.Tensor = weights.meta["val"]
    shape, size = list(map(int, value.shape)), value.numel() * value.element_size()
    return replace(
        entry,
        reason=f"{entry.reason}; each rank has {whose} of its weights {shape}, "
        f"{format_bytes(-(-size // ranks))}, {further}",
    )
