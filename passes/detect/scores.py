"""What a softmax is taken of, as an expression of products and of values from outside."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch.fx import Node

from ringfx.ir.tiles import Expr, const, walk
from ringfx.passes.axes.call import Call
from ringfx.passes.detect.candidate import score
from ringfx.passes.detect.names import BROADCASTS, VIEWS
from ringfx.passes.detect.products import Product
from ringfx.passes.detect.region import Named
from ringfx.passes.detect.roles import Refused, Roles
from ringfx.passes.detect.softmax import Softmax
from ringfx.passes.detect.walk import SHIFTS, op_name
from ringfx.passes.exprs.elements import ELEMENT_RULES, ElementRule, Index
from ringfx.passes.exprs.lift import Lifter
from ringfx.passes.exprs.simplify import simplify

__all__ = ["SHIFT", "ScoreReader"]

aten = torch.ops.aten
SHIFT: Expr = ("shift",)
"""Something equal for all keys of a row, made of its scores: a softmax does not see it."""


class ScoreReader(Lifter):
    """Reads the calls of a region; their axes are known, so views change nothing."""

    def __init__(self, named: Named, roles: Roles, inside: Collection[Node]) -> None:
        super().__init__()
        self.sinks: Expr | None = None
        self.read: dict[Node, Expr] = {}
        self._named = named
        self._roles = roles
        self._inside = frozenset(inside)
        self._products = {p.node: (i, p) for i, p in enumerate(named.products)}
        self._known: dict[Node, Expr] = {}

    def softmax(self, found: Softmax) -> Expr:
        """The scores of a softmax, and what it does besides as a part of them."""
        scores = self.element(found.scores, ())
        if found.factor != 1:
            scores = simplify("mul", scores, const(found.factor))
        if found.added:
            self._one_more(scores, found.added)
        for call in found.kept:
            scores = ("kept", scores, self._kept(call))
        return scores

    def _one_more(self, scores: Expr, added: float) -> None:
        """A number added to the sum of exponentials is a logit that joins them."""
        if any(part == SHIFT for part in walk(scores)):
            raise Refused("a number is added to the sum of exponentials that its row has scaled")
        if self.sinks is not None:
            raise Refused("a column of logits and a number are both added to its softmax")
        self.sinks = const(math.log(added))

    def _kept(self, call: Node) -> Expr:
        """Where a call on exponentials leaves them as they are."""
        args = call.args
        if call.target is aten.masked_fill.Scalar:
            return ("not", self._truth(args[1]))
        if call.target is aten.where.ScalarOther:
            return self._truth(args[0])
        if call.target is aten.mul.Tensor:
            factors = [a for a in args if isinstance(a, Node) and a not in self._named.nodes]
            if len(factors) != 1:
                raise Refused("its exponentials are multiplied with scores")
            return self._truth(factors[0])
        row, column = self._roles.index(self._named.names.dims(call)[-2:])
        edge = ("add", row, const(Call(call)["diagonal"]))
        return ("le", column, edge) if call.target is aten.tril.default else ("ge", column, edge)

    def _truth(self, value: Any) -> Expr:
        read = self.element(value, ())
        is_bool = isinstance(value, Node) and value.meta["val"].dtype == torch.bool
        return ("bool", read) if is_bool else read

    def element(self, value: Any, index: Index) -> Expr:
        if not isinstance(value, Node):
            return const(value)
        if value not in self._known:
            self._known[value] = self._of(value)
        return self._known[value]

    def aligned(self, value: Any, index: Index) -> Expr:
        return self.element(value, index)

    def _of(self, node: Node) -> Expr:
        if node in self._products:
            return self._product(*self._products[node])
        if node not in self._inside:
            return self._entering(node)
        if node.target in SHIFTS or node.target is operator.getitem:
            return self._shift(node)
        if node in self._named.joins:
            return self._joined(node)
        operands = Call(node).operands
        if all(n in self._inside and self.element(n, ()) == SHIFT for n in operands):
            return SHIFT
        if node.target in VIEWS | BROADCASTS or node.target is aten.slice.Tensor:
            return self.element(operands[0], ())
        rule = SCORE_RULES.get(node.target) or ELEMENT_RULES.get(node.target)
        read = rule(self, Call(node), ()) if rule is not None else None
        if read is None:
            raise Refused(f"between its product and its softmax stands {op_name(node)}")
        return read

    def _shift(self, node: Node) -> Expr:
        """A maximum, mean or logsumexp of each row."""
        source = node.all_input_nodes[0] if node.target is operator.getitem else node
        if source.target not in SHIFTS:
            raise Refused(f"between its product and its softmax stands {op_name(source)}")
        dims = self._named.names.dims(source)
        joined = {a for j in self._named.joins.values()
                  for a in self._named.names.space.resolve(j.joined)}  # fmt: skip
        if {a for dim in dims for a in dim} & ({*self._named.keys} | joined):
            raise Refused(f"{op_name(source)} is not taken over its keys")
        return SHIFT

    def _product(self, i: int, product: Product) -> Expr:
        read: Expr = score(i)
        if product.alpha != 1:
            read = simplify("mul", read, const(product.alpha))
        if product.added is not None:
            added = simplify("mul", self.element(product.added, ()), const(product.beta))
            read = simplify("add", read, added)
        return read

    def _joined(self, node: Node) -> Expr:
        join = self._named.joins[node]
        if self.sinks is not None:
            raise Refused("two columns of logits are concatenated to its scores")
        self.sinks = self.element(join.sink, ())
        return self.element(join.scores, ())

    def _entering(self, node: Node) -> Expr:
        if node not in self.captured:
            self.captured.append(node)
        dims = self._named.names.dims(node)
        index = self._roles.index(dims)
        self.read[node] = ("at", self.captured.index(node), *index)
        return self.read[node]


def nan_to_num(lifter: Lifter, call: Call, index: Index) -> Expr | None:
    """On numbers the identity, but -inf becomes the lowest of them."""
    if call["nan"] not in (None, 0):
        return None
    lowest = call["neginf"]
    dtype = call.node.meta["val"].dtype
    lowest = torch.finfo(dtype).min if lowest is None else float(lowest)
    return simplify("lift", lifter.aligned(call["self"], index), const(lowest))


def clamp(lifter: Lifter, call: Call, index: Index) -> Expr | None:
    """At its bounds it has a gradient of its own, which ``clamp_tie`` knows."""
    found = lifter.aligned(call["self"], index)
    for name, head in (("min", "clamp_min"), ("max", "clamp_max")):
        if call.get(name) is not None:
            found = simplify(head, found, lifter.aligned(call[name], index))
    return found


def detached(lifter: Lifter, call: Call, index: Index) -> Expr:
    raise Refused("its scores are detached: no gradient flows to queries and keys")


def either(head: str) -> ElementRule:
    return lambda lifter, call, index: simplify(
        head, lifter.aligned(call["self"], index), lifter.aligned(call["other"], index)
    )


SCORE_RULES: Mapping[object, ElementRule] = {
    aten.max.other: either("max"),
    aten.min.other: either("min"),
    aten.clamp.default: clamp,
    aten.clamp_min.default: clamp,
    aten.nan_to_num.default: nan_to_num,
    aten.detach.default: detached,
}
