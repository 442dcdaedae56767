"""Rows that are sorted, computed with, and put back: the routing of tokens to experts.

    ids_sorted, order = sort(ids)            ids [tokens * choices]
    rows = x[order // choices]               one row a (token, choice), in the order of experts
    ends = cumsum(histogram(ids))
    y = grouped_mm(rows, experts, ends)
    out = y[inverse of order]                back in the order of the tokens

The order is global, the result is not: what token i gets depends on token i alone. So each rank may
sort its own tokens among themselves, count its own, and put them back. That is right if the order
is used for nothing else, which is what is checked here: every user of an order is one that looks
rows up by it or inverts it, and every count ends in the group ends of a grouped product.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from ringfx.passes.axes.call import Call
from ringfx.passes.axes.propagate import AxisMap
from ringfx.passes.axes.rules.contraction import GROUPED
from ringfx.passes.axes.space import AxisClash, Dim
from ringfx.torch_compat.operators import OpOverload

__all__ = ["Route", "find_routes"]

aten = torch.ops.aten

SORTS: Mapping[object, int] = {
    aten.sort.default: 1,
    aten.sort.stable: 1,
    aten.argsort.default: 0,
    aten.argsort.stable: 0,
}
"""Operators that order an axis, and which of their results is the order."""
COPIES = frozenset(
    {
        aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default,
        aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default,
    }
)  # fmt: skip
DIVISIONS = frozenset(
    {
        aten.floor_divide.default, aten.div.Tensor_mode, aten.div.Scalar_mode,
        aten.floor_divide.Scalar,
    }
)  # fmt: skip
INVERSIONS = frozenset({aten.argsort.default, aten.argsort.stable, aten.index_put.default})
ZEROS = frozenset({aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default})
SHAPES_ONLY = frozenset({aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default})
COUNTS = frozenset({aten.histc.default, aten.bincount.default})
FROM_COUNTS = COPIES | {aten.cumsum.default}


@dataclass(frozen=True, eq=False, kw_only=True)
class Route:
    """The calls that must run split together or not at all."""

    nodes: frozenset[Node]
    source: Dim
    """The axis whose elements are put in an order."""
    ordered: Dim
    """The same elements in that order."""
    inverses: frozenset[Node]
    """Calls that make the inverse of the order."""
    counts: frozenset[Node]
    """Values that each rank has of its own, without the axis among their dimensions."""


@dataclass
class _Trace:
    """What is found of one order so far."""

    axes: AxisMap
    source: Dim
    ordered: Dim
    nodes: set[Node] = field(default_factory=set)
    inverses: set[Node] = field(default_factory=set)
    returns: bool = False

    def follow(self, value: Node, names: Dim) -> bool:
        """Whether every use of numbers of ``names``' elements is one that a part may make."""
        return all(self._use(value, names, user) for user in value.users)

    def _use(self, value: Node, names: Dim, user: Node) -> bool:
        target = user.target
        if target in COPIES:
            return self._passed(user, names)
        if target in SHAPES_ONLY:
            return True
        if target in DIVISIONS and user.args[0] is value:
            rest = self._divided(user, names)
            return rest is not None and self._passed(user, rest)
        if target in (aten.index.Tensor, aten.index_select.default):
            return self._looked_up(value, names, user)
        if target in INVERSIONS:
            return self._inverse(value, names, user)
        if target is aten.index_add.default:
            return self._added(value, names, user)
        return False

    def _passed(self, user: Node, names: Dim) -> bool:
        self.nodes.add(user)
        return self.follow(user, names)

    def _divided(self, user: Node, names: Dim) -> Dim | None:
        """Numbers of (token, choice) divided by the choices are numbers of tokens."""
        divisor = user.args[1]
        if not isinstance(divisor, int) or user.kwargs.get("rounding_mode", "floor") is None:
            return None
        names = self.axes.space.resolve(names)
        kept = next(
            (i for i in range(len(names) + 1) if self.axes.space.size(names[i:]) == divisor), None
        )
        return None if kept is None else names[:kept]

    def _looked_up(self, value: Node, names: Dim, user: Node) -> bool:
        call = Call(user)
        if user.target is aten.index_select.default:
            dim = call.dim("dim", len(call.shapes[0]))
        else:
            given = list(call["indices"])
            if [i for i in given if i is not None] != [value]:
                return False
            dim = given.index(value)
        source = call.operands[0]
        if source is value or not self._numbered(self.axes.dims(source)[dim], names):
            return False
        self.nodes.add(user)
        return True

    def _numbered(self, axis: Dim, names: Dim) -> bool:
        """Whether elements of the axis are what the numbers mean: what is looked up by an order of
        all of ``names``' elements, and is as long, has one for each."""
        space = self.axes.space
        if space.size(space.resolve(axis)) == space.size(space.resolve(names)):
            with contextlib.suppress(AxisClash):
                space.unify(axis, names)
        return space.resolve(axis) == space.resolve(names)

    def _inverse(self, value: Node, names: Dim, user: Node) -> bool:
        """argsort(order), or empty[order] = arange."""
        if self.axes.space.resolve(names) != self.axes.space.resolve(self.source):
            return False
        if user.target is aten.index_put.default and not _puts_numbers(user, value):
            return False
        if len(self.axes.values[user]) != 1 or len(self.axes.values[user][0]) != 1:
            return False
        self.axes.space.unify(self.axes.values[user][0][0], self.source)
        self.inverses.add(user)
        self.nodes.add(user)
        return self.follow(user, self.ordered)

    def _added(self, value: Node, names: Dim, user: Node) -> bool:
        """Rows added to those of the tokens that they belong to."""
        call = Call(user)
        dim = call.dim("dim", len(call.shapes[0]))
        into = call.operands[0]
        if value is not call["index"] or value in (into, call["source"]):
            return False
        axis = self.axes.values[into][0][dim]
        fresh = into.target in ZEROS
        if fresh and self.axes.space.size(axis) == self.axes.space.size(names):
            self.axes.space.unify(axis, names)
        if self.axes.space.resolve(axis) != self.axes.space.resolve(names):
            return False
        self.nodes.add(user)
        self.returns = True
        return True


def find_routes(graph: torch.fx.Graph, axes: AxisMap) -> tuple[Route, ...]:
    """Every order of rows that is used for nothing but to compute with rows and put them back.

    Unites the axis of an inverse order with the axis that was ordered.
    """
    found = []
    for node in graph.nodes:
        route = _route(node, axes) if node.target in SORTS else None
        if route is not None:
            found.append(route)
    return tuple(found)


def _route(node: Node, axes: AxisMap) -> Route | None:
    named = axes.ops[node]
    keys = named.call.operands[0]
    if len(named.call.shapes[0]) != 1:
        return None
    order = _result(node, SORTS[node.target])
    if order is None:
        return None
    trace = _Trace(axes, axes.values[keys][0][0], axes.values[order][0][0])
    if not trace.follow(order, trace.source) or not (trace.inverses or trace.returns):
        return None
    counts = _counts(node.graph, axes, trace)
    nodes = frozenset({node, *trace.nodes, *counts})
    return Route(
        nodes=nodes,
        source=trace.source,
        ordered=trace.ordered,
        inverses=frozenset(trace.inverses),
        counts=frozenset(counts),
    )


def _result(node: Node, index: int) -> Node | None:
    if node.target in (aten.argsort.default, aten.argsort.stable):
        return node
    taken = [u for u in node.users if u.target is operator.getitem and u.args[1] == index]
    return taken[0] if len(taken) == 1 else None


def _puts_numbers(user: Node, order: Node) -> bool:
    """``index_put(anything, [order], arange(n))`` with an element for each."""
    _, indices, values, *accumulate = user.args
    return (
        list(indices) == [order]  # type: ignore[arg-type]
        and isinstance(values, Node)
        and values.target is aten.arange.default
        and values.meta["val"].shape == user.meta["val"].shape
        and not any(accumulate)
    )


def _counts(graph: torch.fx.Graph, axes: AxisMap, trace: _Trace) -> set[Node]:
    """Counts of the route's own rows that end in the group ends of its grouped products."""
    ordered = axes.space.resolve(trace.ordered)
    found: set[Node] = set()
    for node in (
        n for target in COUNTS for n in graph.find_nodes(op="call_function", target=target)
    ):
        if axes.dims(node.all_input_nodes[0]) in ((ordered,), (axes.space.resolve(trace.source),)):
            found |= _ends(node, axes, ordered) or set()
    return found


def _ends(value: Node, axes: AxisMap, ordered: Dim) -> set[Node] | None:
    """The values between a count and grouped products, if it is used for nothing else."""
    chain = {value}
    for user in value.users:
        if is_grouped(user) and _group_ends(user) is value:
            if axes.dims(Call(user).operands[0])[0] != ordered:
                return None
        elif user.target in FROM_COUNTS:
            further = _ends(user, axes, ordered)
            if further is None:
                return None
            chain |= further
        else:
            return None
    return chain


def is_grouped(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target.name() in GROUPED


def _group_ends(node: Node) -> Node | None:
    """Where the groups of rows of a grouped product end."""
    found = Call(node).get("offs")
    return found if isinstance(found, Node) else None
