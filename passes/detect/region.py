"""The calls from products to result with their axes named, and whether they may be replaced."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from ringfx.passes.axes.call import Call
from ringfx.passes.axes.rules import find_rule
from ringfx.passes.axes.space import Dim
from ringfx.passes.capture.gradients import needs_grad
from ringfx.passes.detect.names import Factor, Mismatch, Names
from ringfx.passes.detect.products import Product
from ringfx.passes.detect.roles import Pair, Refused
from ringfx.passes.detect.softmax import Softmax
from ringfx.passes.detect.walk import SHIFTS, ValueProduct, op_name

__all__ = ["Join", "Named", "check_gradients", "check_users", "name_region"]

aten = torch.ops.aten


@dataclass(frozen=True, eq=False, kw_only=True)
class Join:
    """A column of logits put beside the scores."""

    scores: Node
    sink: Node
    keys: Dim
    joined: Dim
    start: int
    """Where the scores begin in the joined dimension."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Named:
    """A region whose axes are known."""

    names: Names
    products: tuple[Product, ...]
    factors: Mapping[Node, tuple[Factor, Factor]]
    """Of each product, and of the product with the values."""
    nodes: tuple[Node, ...]
    """In program order, from the products to the result."""
    joins: Mapping[Node, Join]
    scores: tuple[Dim, ...]
    """Axes of what the softmax is taken of; a joined column left out."""
    keys: Dim
    """The axis that the softmax normalises."""

    def source(self, factor: Factor) -> tuple[Dim, ...]:
        return self.names.resolved(factor.dims[factor.source])

    def pair(self, product: Product) -> Pair | None:
        """Which factor holds the keys; None if the product is none of queries with keys."""
        left, right = self.factors[product.node]
        keys = set(self.keys)
        atoms = [{a for dim in self.source(f) for a in dim} for f in (left, right)]
        if keys <= atoms[1] and not keys & atoms[0] and (atoms[0] - atoms[1]) & self._every:
            return Pair(q=left, k=right)
        if keys <= atoms[0] and not keys & atoms[1] and (atoms[1] - atoms[0]) & self._every:
            return Pair(q=right, k=left)
        return None

    @property
    def _every(self) -> set[int]:
        return {a for dim in self.scores for a in dim}


def name_region(
    names: Names,
    products: Sequence[Product],
    inside: Sequence[Node],
    softmax: Softmax,
    value_product: ValueProduct,
    order: Mapping[Node, int],
) -> Named:
    """Name every call from the products to the result.

    Raises
    ------
    Refused
        Where the axes do not line up.
    """
    inner = {p.inner for p in (*products, value_product.product) if p.inner is not None}
    every = {
        *inside,
        *softmax.inner,
        *value_product.nodes,
        value_product.product.node,
        *value_product.after,
        *inner,
    }
    nodes = tuple(sorted(every, key=order.__getitem__))
    namer = _Namer(names, {p.node: p for p in products}, value_product)
    try:
        for node in nodes:
            if node not in inner:
                namer.name(node)
    except Mismatch as mismatch:
        raise Refused(f"the axes of its scores do not line up: {mismatch}") from None
    scores = tuple(namer.unjoined(dim) for dim in names.dims(softmax.scores))
    return Named(
        names=names, products=tuple(products), factors=namer.factors, nodes=nodes,
        joins=namer.joins, scores=scores, keys=scores[softmax.dim],
    )  # fmt: skip


class _Namer:
    def __init__(
        self, names: Names, products: Mapping[Node, Product], value_product: ValueProduct
    ) -> None:
        self.factors: dict[Node, tuple[Factor, Factor]] = {}
        self.joins: dict[Node, Join] = {}
        self._names = names
        self._products = products
        self._value_product = value_product

    def name(self, node: Node) -> None:
        if node in self._products:
            product = self._products[node]
            left, right = (self._names.factor(f) for f in product.factors)
            self._product(product, (left, right))
        elif node is self._value_product.product.node:
            self._values()
        elif node.target is aten.cat.default:
            self._join(node)
        elif node.target is aten.slice.Tensor:
            self._crop(node)
        elif node.target is operator.getitem:
            source, index = node.args
            assert isinstance(source, Node)
            assert isinstance(index, int)
            self._names.alias(node, self._names.values[source][index])
        elif find_rule(node.target, self._names.rules) is None:
            raise Refused(f"the axis table has no row for {op_name(node)}")
        else:
            self._names.call(node)

    def unjoined(self, dim: Dim) -> Dim:
        """The keys, for the dimension that a column was joined to."""
        for join in self.joins.values():
            if dim == self._names.space.resolve(join.joined):
                return self._names.space.resolve(join.keys)
        return dim

    def _product(self, product: Product, factors: tuple[Factor, Factor]) -> None:
        self.factors[product.node] = factors
        self._names.product(product, factors)

    def _values(self) -> None:
        product, side = self._value_product.product, self._value_product.side
        weights = product.factors[side]
        own = Factor(
            node=weights, source=weights, chain=(), dims={weights: self._names.values[weights][0]}
        )
        v = self._names.factor(product.factors[1 - side])
        self._product(product, (own, v) if side == 0 else (v, own))

    def _join(self, node: Node) -> None:
        call = Call(node)
        parts = call.operands
        known = [p in self._names.values for p in parts]
        if len(parts) != 2 or sum(known) != 1:
            raise Refused("several values are concatenated to its scores")
        at = call.dim("dim", len(call.result_shape))
        scores, sink = parts if known[0] else parts[::-1]
        if sink.meta["val"].shape[at] != 1:
            raise Refused("more than one column of logits is concatenated to its scores")
        dims = self._names.dims(scores)
        column = self._names.enter(sink)
        self._names.alias(sink, column)
        beside = [i for i in range(len(dims)) if i != at]
        self._names.unify([dims[i] for i in beside], [column[i] for i in beside])
        joined = self._names.fresh(int(call.result_shape[at]))
        self._names.alias(node, (*dims[:at], joined, *dims[at + 1 :]))
        start = 0 if known[0] else 1
        self.joins[node] = Join(scores=scores, sink=sink, keys=dims[at], joined=joined, start=start)

    def _crop(self, node: Node) -> None:
        """A slice takes a joined column away again, or changes nothing."""
        call = Call(node)
        source: Node = call["self"]
        dims = self._names.dims(source)
        at = call.dim("dim", len(dims))
        if call.result_shape == call.shapes[0]:
            self._names.alias(node, dims)
            return
        start = call["start"] or 0
        start += call.shapes[0][at] if start < 0 else 0
        for join in self.joins.values():
            length = call.shapes[0][at] - 1
            whole = (start, call.result_shape[at], call["step"]) == (join.start, length, 1)
            if dims[at] == self._names.space.resolve(join.joined) and whole:
                self._names.alias(node, (*dims[:at], join.keys, *dims[at + 1 :]))
                return
        raise Refused("a part of its scores or weights is cut out")


def check_users(named: Named, result: Node) -> None:
    """Nothing but the result is used outside.

    Raises
    ------
    Refused
        Naming what else reads a value that the canonical operator never makes.
    """
    inside = set(named.nodes)
    for node in named.nodes:
        others = [u for u in node.users if u not in inside]
        if node is result or not others:
            continue
        what = "weights" if _sums_to_one(node, named) else "scores"
        if any(u.op == "output" for u in others):
            raise Refused(f"its {what} are also an output, so they must exist as a matrix")
        by = ", ".join(sorted({op_name(u) for u in others}))
        raise Refused(f"its {what} have other users ({by}), so they must exist as a matrix")


def _sums_to_one(node: Node, named: Named) -> bool:
    return any(n.target in _WEIGHTS for n in (node, *node.all_input_nodes)) and node in named.nodes


_WEIGHTS = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default, aten.div.Tensor)


def check_gradients(named: Named, drawn: Collection[Node] = ()) -> None:
    """No call on the way cuts the gradient that its operands ask for, but for row maxima and what
    only draws random numbers."""
    inside = set(named.nodes)
    for node in named.nodes:
        if node in drawn:
            continue
        if not isinstance(node.meta.get("val"), torch.Tensor) or not _differentiable(node):
            continue
        if node.target in SHIFTS or node.target is aten.detach.default:
            continue
        cut = any(needs_grad(n) for n in node.all_input_nodes) and not needs_grad(node)
        if cut and (node in named.factors or any(n in inside for n in node.all_input_nodes)):
            raise Refused(f"{op_name(node)} cuts the gradient on its way")


def _differentiable(node: Node) -> bool:
    value = node.meta["val"]
    return bool(value.is_floating_point())
