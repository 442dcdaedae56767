"""Axes of tokens that channels are weighed over: cross-covariance, or channel, attention.

A softmax over scores of features with features, made by a product that sums over another axis, says
that this axis is the tokens. Ranks then add up [channels, channels], and gather nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch.fx import Graph, Node

from ringfx.passes.axes import AxisMap, how
from ringfx.passes.axes.call import AxisSharing
from ringfx.passes.axes.features import feature_axes, learned_values
from ringfx.passes.axes.space import Dim
from ringfx.passes.token_axes.row_maps import is_product

__all__ = ["axes_of_channel_maps"]


def axes_of_channel_maps(graph: Graph, axes: AxisMap, held: Collection[Node]) -> list[Dim]:
    """What scores that a softmax normalises over features are summed over.

    Parameters
    ----------
    held
        Inputs that modules hold: parameters and buffers.
    """
    learned = learned_values(graph, held)
    softmaxes = [n for n, named in axes.ops.items() if isinstance(named.axes.how, how.Normalise)]
    if not softmaxes:
        return []
    features = feature_axes(axes, learned)
    found: dict[Dim, None] = {}
    for node in softmaxes:
        family = axes.ops[node].axes.how
        assert isinstance(family, how.Normalise)
        if features.issuperset(axes.dims(node)[family.dim] or (-1,)):
            for product in _products_above(axes, node, learned):
                found |= dict.fromkeys(_summed_over(axes, product, features))
    return [*found]


def _products_above(axes: AxisMap, node: Node, learned: frozenset[Node]) -> Iterator[Node]:
    """The nearest products of two computed values that a value is made of."""
    seen, waiting = {node}, [node]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source in seen or source in learned:
                continue
            seen.add(source)
            if not is_product(axes, source):
                waiting.append(source)
            elif learned.isdisjoint(axes.ops[source].call.operands):
                yield source


def _summed_over(axes: AxisMap, product: Node, features: frozenset[int]) -> Iterator[Dim]:
    """Axes that a product of features with features sums over, if those are no features."""
    named = axes.ops[product]
    sides = [{x for dim in axes.dims(n) for x in dim} for n in named.call.operands]
    shared = set[int].intersection(*sides)
    result = [x for dim in axes.dims(product) for x in dim]
    rows = [x for x in result if x not in shared or result.count(x) > 1]
    summed = [
        axis
        for name, share in named.axes.share.items()
        if share is AxisSharing.PARTIAL_SUM and (axis := axes.label(product, name))
    ]
    if rows and features.issuperset(rows) and features.isdisjoint(x for s in summed for x in s):
        yield from summed
