"""Softmax in all its forms: the function, or exponentials divided by their sum."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch.fx import Graph, Node

from ringfx.passes.axes.call import Call
from ringfx.passes.capture.gradients import needs_grad
from ringfx.passes.detect.names import VIEWS

__all__ = [
    "CASTS",
    "ROOTS",
    "Divisors",
    "Softmax",
    "leaves_out",
    "merge_exponentials",
    "softmax_call",
]

aten = torch.ops.aten


@dataclass(frozen=True, eq=False, kw_only=True)
class Softmax:
    """weights = softmax of scores over a dimension."""

    scores: Node
    dim: int
    weights: Node
    """Sum to one over the dimension; exponentials where ``total`` divides later."""
    inner: frozenset[Node]
    """Calls from the scores to the weights, and to the sum."""
    total: Node | None = None
    """The sum of exponentials, where the product with the values comes before the division."""
    divisors: Divisors | None = None
    """The sum of exponentials in its forms, where there is one."""
    kept: tuple[Node, ...] = ()
    """Calls that leave exponentials out before they are summed."""
    factor: float = 1.0
    """Multiplies the scores: log(2) where the exponentials are powers of 2."""
    masked: Literal["nan", "zero"] = "nan"
    """What a row of -inf becomes."""

    @property
    def added(self) -> float:
        """A number added to the sum of a row: a logit of its logarithm."""
        return 0.0 if self.divisors is None else self.divisors.added


@dataclass(frozen=True, eq=False, kw_only=True)
class Divisors:
    """Values that weights are divided by, or multiplied with."""

    total: Node
    dim: int
    added: float
    divide: frozenset[Node]
    multiply: frozenset[Node]
    every: frozenset[Node]

    def divides(self, call: Node, value: Node) -> bool:
        """Whether the call is the value divided by the sum."""
        if call.target in _DIVISIONS:
            return call.args[0] is value and call.args[1] in self.divide
        if call.target is not aten.mul.Tensor:
            return False
        others = [x for x in call.args if x is not value]
        return len(others) == 1 and others[0] in self.multiply


def softmax_call(node: Node) -> Softmax | None:
    """The softmax that has this call as its root (see ``ROOTS``), or None."""
    rule = ROOTS.get(node.target)
    return rule(node) if rule is not None else None


def merge_exponentials(graph: Graph) -> None:
    """``exp(s) / exp(s).sum(-1)`` has one exponential, as if it were written with a name."""
    first: dict[tuple[object, ...], Node] = {}
    for node in list(graph.nodes):
        if node.target in (aten.exp.default, aten.exp2.default):
            same = first.setdefault((node.target, node.args[0], needs_grad(node)), node)
            if same is not node:
                node.replace_all_uses_with(same)
                graph.erase_node(node)


def softmax(node: Node) -> Softmax | None:
    """The function; its weights may be masked and divided by their sum once more."""
    call = Call(node)
    plain = _plain(call["self"], call["dim"], node, frozenset({node}))
    again = _by_sum(node, call["self"])
    if again is None or again.total is not None or again.added or again.dim != plain.dim:
        return plain
    return again


def safe_softmax(node: Node) -> Softmax | None:
    call = Call(node)
    scores: Node = call["self"]
    return Softmax(
        scores=scores, dim=_dim(call["dim"], scores), weights=node, inner=frozenset({node}),
        masked="zero",
    )  # fmt: skip


def exponential(node: Node) -> Softmax | None:
    """exp(log_softmax(x)), exp(x - logsumexp(x)), or exp(x) and a division by its sum."""
    source = node.args[0]
    if not isinstance(source, Node):
        return None
    if source.target in (aten.log_softmax.int, aten._log_softmax.default):
        call = Call(source)
        return _plain(call["self"], call["dim"], node, frozenset({source, node}))
    return _by_logsumexp(node, source) or _by_sum(node, source)


def power_of_two(node: Node) -> Softmax | None:
    source = node.args[0]
    found = _by_sum(node, source) if isinstance(source, Node) else None
    return None if found is None else replace(found, factor=math.log(2.0))


def _by_logsumexp(node: Node, source: Node) -> Softmax | None:
    if source.target is not aten.sub.Tensor or Call(source)["alpha"] != 1:
        return None
    scores, shift = source.args
    total, views = _through_views(shift)
    if total is None or total.target is not aten.logsumexp.default or total.args[0] is not scores:
        return None
    (dim, *more) = Call(total)["dim"]
    assert isinstance(scores, Node)
    return None if more else _plain(scores, dim, node, frozenset({total, *views, source, node}))


def _by_sum(node: Node, source: Node) -> Softmax | None:
    """Exponentials, perhaps some left out, and their sum."""
    kept = tuple(_left_out(node))
    last = kept[-1] if kept else node
    for total in last.users:
        divisors = _divisors(total)
        if divisors is None:
            continue
        dim, inner = _dim(divisors.dim, source), frozenset({node, *kept, *divisors.every})
        of_sum = partial(
            Softmax, scores=source, dim=dim, divisors=divisors,
            kept=tuple(n for n in kept if not _is_same(n)),
        )  # fmt: skip
        for divided in last.users:
            if divisors.divides(divided, last):
                return of_sum(weights=divided, inner=inner | {divided})
        return of_sum(weights=last, inner=inner, total=total)
    return None


def _left_out(node: Node) -> Iterator[Node]:
    """Calls that leave some exponentials out, one after the other, up to where they are summed."""
    current = node
    while len(current.users) == 1:
        (user,) = current.users
        if not _is_same(user) and not leaves_out(user, current):
            return
        yield user
        current = user


def _is_same(call: Node) -> bool:
    """A cast, or a dropout that drops nothing."""
    if call.target is aten.dropout.default:
        return not Call(call)["train"] or bool(Call(call)["p"] == 0)
    return call.target in CASTS


def leaves_out(call: Node, value: Node) -> bool:
    """Whether a call makes some elements of a value 0: times a mask, filled, chosen, a triangle."""
    args = call.args
    if call.target is aten.mul.Tensor:
        return all(isinstance(a, Node) for a in args) and args[0] is not args[1]
    if call.target is aten.masked_fill.Scalar:
        return bool(args[0] is value and args[2] == 0)
    if call.target is aten.where.ScalarOther:
        return bool(args[1] is value and args[2] == 0)
    return call.target in (aten.tril.default, aten.triu.default)


def _divisors(total: Node) -> Divisors | None:
    """A sum over one dimension, a number perhaps added to it, viewed, its reciprocal."""
    if total.target is not aten.sum.dim_IntList or len(Call(total)["dim"] or ()) != 1:
        return None
    (dim,) = Call(total)["dim"]
    sums = {total, *_views_of(total)}
    divide, number = sums, 0.0
    for more in [u for n in sums for u in n.users if u.target in _ADDITIONS]:
        added = more.args[1]
        if isinstance(added, (int, float)) and added > 0 and Call(more).get("alpha", 1) == 1:
            divide, number = {more, *_views_of(more)}, float(added)
    inverses = [u for n in divide for u in n.users if _is_reciprocal(u)]
    multiply = {x for u in inverses for x in (u, *_views_of(u))}
    return Divisors(
        total=total, dim=dim, added=number, divide=frozenset(divide),
        multiply=frozenset(multiply), every=frozenset(sums | divide | multiply),
    )  # fmt: skip


def _is_reciprocal(call: Node) -> bool:
    inverted = call.target is aten.pow.Tensor_Scalar and bool(call.args[1] == -1)
    return inverted or call.target is aten.reciprocal.default


_DIVISIONS = (aten.div.Tensor, aten.true_divide.Tensor, aten.divide.Tensor)
_ADDITIONS = (aten.add.Tensor, aten.add.Scalar)
CASTS = frozenset({
    aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten._to_copy.default,
    aten.type_as.default,
})  # fmt: skip


def _plain(scores: Node, dim: int, weights: Node, inner: frozenset[Node]) -> Softmax:
    return Softmax(scores=scores, dim=_dim(dim, scores), weights=weights, inner=inner)


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


ROOTS: Mapping[object, Callable[[Node], Softmax | None]] = {
    aten.softmax.int: softmax,
    aten._softmax.default: softmax,
    aten._safe_softmax.default: safe_softmax,
    aten.exp.default: exponential,
    aten.exp2.default: power_of_two,
}
