"""The calls around a softmax: back to the products in its scores, on to the product with V."""

from __future__ import annotations

import math
import operator
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ringfx.passes.axes.call import Call
from ringfx.passes.axes.rules import find_rule
from ringfx.passes.axes.rules.pointwise import elementwise
from ringfx.passes.detect.candidate import NearMiss
from ringfx.passes.detect.drops import Drop, dropped, scaled
from ringfx.passes.detect.names import BROADCASTS, VIEWS
from ringfx.passes.detect.products import Product, as_product
from ringfx.passes.detect.softmax import CASTS, Softmax
from ringfx.torch_compat.graphs import position_key

__all__ = [
    "SHIFTS",
    "ScoreOperands",
    "ValueProduct",
    "learned",
    "op_name",
    "walk_to_products",
    "walk_to_value_product",
]

aten = torch.ops.aten

LOOKED_AT = 512
"""Calls looked at behind one softmax; scores with more between them and their product are none."""

SHIFTS = frozenset({
    aten.amax.default, aten.max.dim, aten.logsumexp.default, aten.mean.dim, aten.amin.default,
})  # fmt: skip
"""Reductions whose result may be subtracted from a row of scores."""


def is_elementwise(node: Node) -> bool:
    return node.op == "call_function" and find_rule(node.target) is elementwise


def op_name(node: Node) -> str:
    """The operator's name without its namespace."""
    name = getattr(node.target, "_schema", None)
    return str(name.name).split("::")[-1] if name is not None else str(node.target)


@dataclass(frozen=True, eq=False, kw_only=True)
class ScoreOperands:
    """The calls from which the scores of a softmax are computed."""

    products: tuple[Product, ...]
    """Products of two values of the program, nearest first."""
    projections: tuple[Product, ...]
    """Products with a parameter as it stands: linear layers."""
    seen: frozenset[Node]
    """Everything between, masks included."""
    stopped: tuple[Node, ...] = ()
    """Calls that scores do not pass through and that a product of two values is just behind."""

    def inside(self, products: Sequence[Product], order: Mapping[Node, int]) -> list[Node]:
        """The calls that depend on one of the products, in program order."""
        made = {p.node for p in products}
        found: list[Node] = []
        for node in sorted(self.seen, key=order.__getitem__):
            if node in made or (_passes(node) and any(n in made for n in node.all_input_nodes)):
                made.add(node)
                found.append(node)
        return found


def walk_to_products(start: Node, parameters: frozenset[Node]) -> ScoreOperands:
    """Walk back over elementwise calls, views and reductions, up to products."""
    products: list[Product] = []
    projections: list[Product] = []
    seen: set[Node] = set()
    stopped: list[Node] = []
    queue = deque([start])
    while queue and len(seen) < LOOKED_AT:
        node = queue.popleft()
        if node in seen:
            continue
        seen.add(node)
        product = as_product(node)
        if product is not None:
            direct = any(learned(f, parameters) for f in product.factors)
            (projections if direct else products).append(product)
        elif _is_mask(node):
            continue  # what is kept may be computed from products: they are no scores
        elif _passes(node):
            queue.extend(node.all_input_nodes)
        elif any(_is_scores(n, parameters) for n in node.all_input_nodes):
            stopped.append(node)
    return ScoreOperands(
        products=tuple(products), projections=tuple(projections), seen=frozenset(seen),
        stopped=tuple(stopped),
    )  # fmt: skip


def _is_mask(node: Node) -> bool:
    """Whether it says of something whether it holds, so that no scores pass through."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype == torch.bool


def _is_scores(node: Node, parameters: frozenset[Node]) -> bool:
    """A product of two values, scaled, masked and viewed by a few calls."""
    for _ in range(8):
        product = as_product(node)
        if product is not None:
            return not any(learned(f, parameters) for f in product.factors)
        inputs = node.all_input_nodes
        if not inputs or not (_passes(node) or _sizes(node) == _sizes(inputs[0])):
            return False
        node = inputs[0]
    return False


def _sizes(node: Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def _passes(node: Node) -> bool:
    """Whether scores stay scores through a call: elements, views, a sink, the maximum of a row."""
    return (
        is_elementwise(node)
        or node.target in VIEWS
        or node.target in BROADCASTS
        or node.target in SHIFTS
        or node.target in (aten.cat.default, aten.slice.Tensor, operator.getitem)
    )


def learned(node: Node, parameters: frozenset[Node]) -> bool:
    """Whether a value is a parameter as it stands: viewed, cast or scaled by a number."""
    while node not in parameters:
        inputs = node.all_input_nodes
        plain = node.target in VIEWS | BROADCASTS | CASTS or is_elementwise(node)
        if not plain or len(inputs) != 1:
            return False
        node = inputs[0]
    return True


@dataclass(frozen=True, eq=False, kw_only=True)
class ValueProduct:
    """From the weights to the product with the values, and on to the result."""

    nodes: tuple[Node, ...]
    """The calls between, in program order."""
    product: Product
    side: int
    """Which factor of the product the weights are."""
    after: tuple[Node, ...] = ()
    """Calls after the product: the division by the sum of a row, and views before it."""
    dropout: float = 0.0
    drops: tuple[Drop, ...] = ()
    """Where weights become 0 at random."""
    zeroed: bool = False
    """NaN became 0 on the way."""

    @property
    def result(self) -> Node:
        return self.after[-1] if self.after else self.product.node


def walk_to_value_product(softmax: Softmax) -> ValueProduct | NearMiss | None:
    """The product of the weights with the values; None where there is no product at all."""
    nodes: list[Node] = []
    current = softmax.weights
    drops: list[Drop] = []
    zeroed = False
    while True:
        users = [u for u in current.users if u not in softmax.inner]
        filled = _nan_filled(current, users)
        if filled:
            nodes += filled
            current, zeroed = filled[-1], True
            continue
        drop = dropped(current, users) or (scaled(current, users) if drops else None)
        if isinstance(drop, str):
            return NearMiss(drop)
        if drop is not None:
            nodes += drop.calls
            drops.append(drop)
            current = drop.result
            continue
        if len(users) != 1:
            return _used_again(current, users)
        (user,) = users
        product = _product_of(user, current)
        if product is not None:
            break
        if user.target is aten.nan_to_num.default and Call(user)["nan"] in (None, 0):
            zeroed = True
        elif user.target not in VIEWS | BROADCASTS | CASTS | {aten.slice.Tensor}:
            return _stopped(user)
        nodes.append(user)
        current = user
    sides = [i for i, f in enumerate(product.factors) if f is current]
    if len(sides) != 1:
        return NearMiss("its attention weights are multiplied with themselves")
    after = _divided(product.node, softmax)
    if isinstance(after, NearMiss):
        return after
    dropout = _dropout(drops)
    if isinstance(dropout, NearMiss):
        return dropout
    return ValueProduct(
        nodes=tuple(nodes), product=product, side=sides[0], after=after, dropout=dropout,
        drops=tuple(drops), zeroed=zeroed,
    )  # fmt: skip


def _dropout(drops: Sequence[Drop]) -> float | NearMiss:
    """The share of weights that are dropped in all: several draws are as one."""
    keeps, factor = (math.prod(x) for x in ((d.keeps for d in drops), (d.factor for d in drops)))
    if keeps == 0:
        return NearMiss("its dropout drops all of its weights")
    if not math.isclose(keeps * factor, 1.0, rel_tol=1e-6):
        return NearMiss(
            f"its weights are kept with a chance of {keeps:g} and multiplied by {factor:g}: their "
            "mean is not what it was, as that of a dropout is"
        )
    return 1 - keeps


def _nan_filled(value: Node, users: Sequence[Node]) -> list[Node]:
    """``where(isnan(p), 0, p)`` in all its forms, the calls in program order; empty for others."""
    *asked, last = sorted(users, key=position_key) or [value]
    if not asked or any(list(n.users) != [last] for n in asked):
        return []
    tests = [n for n in asked if n.target is aten.isnan.default]
    zeros = [n for n in asked if n.target in (aten.zeros_like.default, aten.new_zeros.default)]
    nothing = [*zeros, 0, 0.0]
    for test in tests:
        filled = [(test, zero, value) for zero in nothing]
        forms: dict[Any, list[Any]] = {
            aten.masked_fill.Scalar: [(value, test, 0), (value, test, 0.0)],
            aten.where.self: filled, aten.where.ScalarSelf: filled,
        }  # fmt: skip
        if len(tests) + len(zeros) == len(asked) and last.args in forms.get(last.target, ()):
            return [*asked, last]
    return []


def _product_of(user: Node, value: Node) -> Product | None:
    """The product that a call is, or that the sum after an elementwise product is."""
    product = as_product(user)
    if product is None and user.target is aten.mul.Tensor and len(user.users) == 1:
        product = as_product(next(iter(user.users)))
    return product if product is not None and value in product.factors else None


def _used_again(value: Node, users: Sequence[Node]) -> NearMiss | None:
    """Weights with several users: a near miss if one of them is a product."""
    if not any(_product_of(u, value) or any(_ahead(u)) for u in users):
        return None
    others = [u for u in users if not (_product_of(u, value) or _leads_to_product(u))]
    if any(u.op == "output" for u in users):
        return NearMiss("its attention weights are also an output, so they must exist as a matrix")
    if not others:
        return NearMiss("its attention weights are multiplied with several values")
    names = ", ".join(sorted({op_name(u) for u in others}))
    return NearMiss(
        f"its attention weights have other users ({names}), so they must exist as a matrix"
    )


def _leads_to_product(node: Node) -> bool:
    current = node
    while current.target in VIEWS | BROADCASTS | CASTS | {aten.dropout.default}:
        if len(current.users) != 1:
            return False
        user = next(iter(current.users))
        if _product_of(user, current):
            return True
        current = user
    return False


def _stopped(user: Node) -> NearMiss | None:
    """Something other than a product takes the weights."""
    if user.op == "output" or not any(_ahead(user)):
        return None
    return NearMiss(
        f"its attention weights pass through {op_name(user)} before the product with the values"
    )


def _ahead(node: Node) -> Iterator[bool]:
    """Products a few calls ahead."""
    queue, seen = deque([(node, 0)]), set[Node]()
    while queue:
        current, depth = queue.popleft()
        if current in seen or depth > 3:
            continue
        seen.add(current)
        if as_product(current) is not None:
            yield True
        queue.extend((u, depth + 1) for u in current.users)


def _divided(node: Node, softmax: Softmax) -> tuple[Node, ...] | NearMiss:
    """The division by the sum of each row, where it comes after the product."""
    if softmax.total is None or softmax.divisors is None:
        return ()
    found: list[Node] = []
    current = node
    while len(current.users) == 1:
        user = next(iter(current.users))
        if softmax.divisors.divides(user, current):
            return (*found, user)
        if user.target not in VIEWS:
            break
        found.append(user)
        current = user
    return NearMiss("its exponentials are never divided by their sum")
