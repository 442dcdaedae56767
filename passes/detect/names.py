"""Axes of one region: the axis table followed from the operands of products to their result.

Each operand of a product has axes of its own, so that in self-attention the queries' tokens and the
keys' are two axes here, whatever they are to the whole program.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from ringfx.passes.axes import AxisMap
from ringfx.passes.axes.call import Call, OpAxes, result_values
from ringfx.passes.axes.propagate import bind, results_of
from ringfx.passes.axes.rules import find_rule
from ringfx.passes.axes.space import AxisClash, AxisSpace, Dim
from ringfx.passes.detect.products import Product

__all__ = ["BROADCASTS", "VIEWS", "Factor", "Names"]

aten = torch.ops.aten

VIEWS = frozenset({
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
    aten.unflatten.int, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.permute.default, aten.transpose.int, aten.swapaxes.default, aten.swapdims.default,
    aten.t.default, aten.mT.default, aten.numpy_T.default, aten.movedim.int, aten.movedim.intlist,
    aten.moveaxis.int, aten.moveaxis.intlist, aten.unsqueeze.default, aten.contiguous.default,
    aten.clone.default, aten.alias.default, aten.ravel.default,
})  # fmt: skip
"""Operators that keep every element, and its gradient."""

BROADCASTS = frozenset({
    aten.expand.default, aten.repeat.default, aten.repeat_interleave.self_int,
    aten.expand_as.default,
})  # fmt: skip
"""Operators that repeat elements along an axis of their own."""


class Mismatch(Exception):
    """The axes of a region do not line up."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Factor:
    """An operand of a product, and the value that it is a view of, grouped heads not repeated."""

    node: Node
    source: Node
    chain: tuple[Node, ...]
    """The views from the source to the operand, in program order."""
    dims: Mapping[Node, tuple[Dim, ...]]
    """Of the source and of each view."""


class Names:
    """The axes of a region's values; unresolved until all of it has been named."""

    def __init__(self, whole: AxisMap) -> None:
        self.space = AxisSpace()
        self.values: dict[Node, tuple[tuple[Dim, ...], ...]] = {}
        self.rules = whole.rules
        self._whole = whole
        self._origins: list[tuple[Dim, Dim]] = []

    def dims(self, node: Node, index: int = 0) -> tuple[Dim, ...]:
        return self.resolved(self.values[node][index])

    def resolved(self, dims: Sequence[Dim]) -> tuple[Dim, ...]:
        return tuple(self.space.resolve(dim) for dim in dims)

    def origins(self) -> dict[int, set[int]]:
        """For each axis the axes of the whole program that it stands for."""
        found: dict[int, set[int]] = {}
        for local, whole in self._origins:
            for atom in self.space.resolve(local):
                found.setdefault(atom, set()).update(self._whole.space.resolve(whole))
        return found

    def enter(self, node: Node) -> tuple[Dim, ...]:
        """New axes for a value from outside, cut as the whole program cuts it."""
        dims: list[Dim] = []
        for whole in self._whole.dims(node):
            local: list[int] = []
            for atom in whole:
                new = self.space.fresh(self._whole.space.size((atom,)))
                self._origins.append((new, (atom,)))
                local.extend(new)
            dims.append(tuple(local))
        return tuple(dims)

    def factor(self, node: Node) -> Factor:
        """The operand seen through its views to the smallest value that holds its elements."""
        chain = [node]
        while chain[-1].target in VIEWS | BROADCASTS and len(Call(chain[-1]).operands) == 1:
            chain.append(Call(chain[-1]).operands[0])
        sizes = [n.meta["val"].numel() for n in chain]
        chain = chain[: sizes.index(min(sizes)) + 1][::-1]
        values: dict[Node, tuple[tuple[Dim, ...], ...]] = {chain[0]: (self.enter(chain[0]),)}
        for view in chain[1:]:
            self._name(view, [values[Call(view).operands[0]][0]], values)
        return Factor(
            node=node, source=chain[0], chain=tuple(chain[1:]),
            dims={n: d[0] for n, d in values.items()},
        )  # fmt: skip

    def product(self, product: Product, factors: tuple[Factor, Factor]) -> None:
        """Name a product's result after its factors."""
        axes = OpAxes(operands=product.labels, results=(product.result,))
        bound = self._bind([f.dims[f.node] for f in factors], axes)
        if product.added is not None:
            given = OpAxes(operands=(product.added_labels,), results=())
            self._unite(bound, self._bind([self._value(product.added)], given))
        self.values[product.node] = (
            tuple(tuple(a for name in dim for a in bound[name]) for dim in product.result),
        )

    def call(self, node: Node) -> None:
        """Name a call's results after its operands."""
        self._name(node, [self._value(n) for n in Call(node).operands], self.values)

    def alias(self, node: Node, dims: tuple[Dim, ...]) -> None:
        self.values[node] = (dims,)

    def fresh(self, size: int) -> Dim:
        return self.space.fresh(size)

    def unify(self, a: Iterable[Dim], b: Iterable[Dim]) -> None:
        for x, y in zip(a, b, strict=True):
            try:
                self.space.unify(x, y)
            except AxisClash as clash:
                raise Mismatch(str(clash)) from None

    def _value(self, node: Node) -> tuple[Dim, ...]:
        if node not in self.values:
            self.values[node] = (self.enter(node),)
        return self.values[node][0]

    def _name(
        self,
        node: Node,
        operands: list[tuple[Dim, ...]],
        values: dict[Node, tuple[tuple[Dim, ...], ...]],
    ) -> None:
        rule = find_rule(node.target, self.rules)
        assert rule is not None, f"{node.target} has a row in the axis table"
        call = Call(node)
        axes = rule(call)
        bound = self._bind(operands, axes)
        values[node] = results_of(self.space, operands, call, axes, bound)
        shapes = [tuple(v.shape) for v in result_values(node)]
        for dims, shape in zip(values[node], shapes, strict=True):
            sizes = tuple(self.space.size(self.space.resolve(d)) for d in dims)
            if sizes != shape:
                raise Mismatch(f"{node.name} has axes of {sizes} and the shape {shape}")

    def _bind(self, operands: Sequence[tuple[Dim, ...]], axes: OpAxes) -> dict[str, Dim]:
        bound, clash = bind(self.space, operands, axes)
        if clash:
            raise Mismatch("two of its dimensions have factors that do not line up")
        return bound

    def _unite(self, bound: Mapping[str, Dim], more: Mapping[str, Dim]) -> None:
        for name, dim in more.items():
            if name in bound:
                self.unify([bound[name]], [dim])
