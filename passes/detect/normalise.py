"""Every way to say softmax: the function, or exponentials divided by their sum."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch.fx import Node

from ringfx.passes.axes.call import Call
from ringfx.passes.detect.names import VIEWS

__all__ = ["Normalised", "normalised"]

aten = torch.ops.aten


@dataclass(frozen=True, eq=False, kw_only=True)
class Normalised:
    """weights = softmax of scores over a dimension."""

    scores: Node
    dim: int
    weights: Node
    """Sum to one over the dimension; exponentials where ``total`` divides later."""
    inner: frozenset[Node]
    """Calls from the scores to the weights, and to the sum."""
    total: Node | None = None
    """The sum of exponentials, where the product with the values comes before the division."""
    sums: frozenset[Node] = frozenset()
    """The total and its views."""
    masked: Literal["nan", "zero"] = "nan"
    """What a row of -inf becomes."""


def normalised(node: Node) -> Normalised | None:
    """The softmax that this call is the heart of, or None."""
    rule = ROOTS.get(node.target)
    return rule(node) if rule is not None else None


def softmax(node: Node) -> Normalised | None:
    call = Call(node)
    return _plain(call["self"], call["dim"], node, frozenset({node}))


def safe_softmax(node: Node) -> Normalised | None:
    call = Call(node)
    scores: Node = call["self"]
    return Normalised(
        scores=scores, dim=_dim(call["dim"], scores), weights=node, inner=frozenset({node}),
        masked="zero",
    )  # fmt: skip


def exponential(node: Node) -> Normalised | None:
    """exp(log_softmax(x)), exp(x - logsumexp(x)), or exp(x) and a division by its sum."""
    source = node.args[0]
    if not isinstance(source, Node):
        return None
    if source.target in (aten.log_softmax.int, aten._log_softmax.default):
        call = Call(source)
        return _plain(call["self"], call["dim"], node, frozenset({source, node}))
    return _by_logsumexp(node, source) or _by_sum(node, source)


def _by_logsumexp(node: Node, source: Node) -> Normalised | None:
    if source.target is not aten.sub.Tensor or Call(source)["alpha"] != 1:
        return None
    scores, shift = source.args
    total, views = _through_views(shift)
    if total is None or total.target is not aten.logsumexp.default or total.args[0] is not scores:
        return None
    (dim, *more) = Call(total)["dim"]
    assert isinstance(scores, Node)
    return None if more else _plain(scores, dim, node, frozenset({total, *views, source, node}))


def _by_sum(node: Node, source: Node) -> Normalised | None:
    for total in node.users:
        if total.target is not aten.sum.dim_IntList or len(Call(total)["dim"] or ()) != 1:
            continue
        (dim,) = Call(total)["dim"]
        sums = frozenset({total, *_views_of(total)})
        inner = frozenset({node, *sums})
        for divided in node.users:
            by_sum = divided.target in _DIVISIONS and divided.args[1] in sums
            if by_sum and divided.args[0] is node:
                return _plain(source, dim, divided, inner | {divided})
        return Normalised(
            scores=source, dim=_dim(dim, source), weights=node, inner=inner, total=total, sums=sums
        )
    return None


_DIVISIONS = (aten.div.Tensor, aten.true_divide.Tensor, aten.divide.Tensor)


def _plain(scores: Node, dim: int, weights: Node, inner: frozenset[Node]) -> Normalised:
    return Normalised(scores=scores, dim=_dim(dim, scores), weights=weights, inner=inner)


def _dim(dim: int, scores: Node) -> int:
    rank: int = scores.meta["val"].dim()
    return dim % max(rank, 1)


def _through_views(value: object) -> tuple[Node | None, list[Node]]:
    views: list[Node] = []
    while isinstance(value, Node) and value.target in VIEWS:
        views.append(value)
        value = value.args[0]
    return (value if isinstance(value, Node) else None), views


def _views_of(value: Node) -> Iterator[Node]:
    for user in value.users:
        if user.target in VIEWS:
            yield user
            yield from _views_of(user)


ROOTS: Mapping[object, Callable[[Node], Normalised | None]] = {
    aten.softmax.int: softmax,
    aten._softmax.default: softmax,
    aten._safe_softmax.default: safe_softmax,
    aten.exp.default: exponential,
}
