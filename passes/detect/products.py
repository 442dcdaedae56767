"""Contractions of two values, in every form, with the labels of their dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ringfx.passes.axes.call import Call, Labels
from ringfx.passes.axes.rules import find_rule
from ringfx.passes.axes.rules.pointwise import broadcast

__all__ = ["Product", "as_product"]

aten = torch.ops.aten

_FACTORS: Mapping[object, tuple[str, str]] = {
    aten.matmul.default: ("self", "other"),
    aten.mm.default: ("self", "mat2"),
    aten.bmm.default: ("self", "mat2"),
    aten.mv.default: ("self", "vec"),
    aten.linear.default: ("input", "weight"),
    aten.addmm.default: ("mat1", "mat2"),
    aten.baddbmm.default: ("batch1", "batch2"),
}


@dataclass(frozen=True, eq=False, kw_only=True)
class Product:
    """sum over shared labels of left * right, and perhaps something added to it."""

    node: Node
    factors: tuple[Node, Node]
    places: tuple[int, int]
    """Positions of the factors among the tensor operands of ``call``."""
    labels: tuple[Labels, Labels]
    result: Labels
    added: Node | None = None
    """``beta * added`` is added to ``alpha`` times the product."""
    added_labels: Labels = ()
    alpha: float = 1.0
    beta: float = 1.0
    inner: Node | None = None
    """The elementwise product under a sum."""

    @property
    def call(self) -> Node:
        """The call that takes the factors."""
        return self.node if self.inner is None else self.inner

    def contracted(self) -> frozenset[str]:
        """Labels of both factors that the result has not."""
        kept = _names(self.result)
        return frozenset((_names(self.labels[0]) | _names(self.labels[1])) - kept)


def as_product(node: Node) -> Product | None:
    """The call as a product of two tensors, or None."""
    if node.target is aten.einsum.default:
        return _einsum(node)
    if node.target is aten.sum.dim_IntList:
        return _sum_of_products(node)
    names = _FACTORS.get(node.target)
    return None if names is None else _named(node, names)


def _named(node: Node, names: tuple[str, str]) -> Product:
    call, labels = _ruled(node)
    at = [call.position(n) for n in names]
    added = call.get("bias") if node.target is aten.linear.default else _added(call)
    return Product(
        node=node,
        factors=(call[names[0]], call[names[1]]),
        places=(at[0], at[1]),
        labels=(labels[0][at[0]], labels[0][at[1]]),
        result=labels[1],
        added=added,
        added_labels=_of_added(call, labels, added),
        alpha=float(call.get("alpha", 1)),
        beta=float(call.get("beta", 1)),
    )


def _added(call: Call) -> Node | None:
    """The first operand of addmm and baddbmm; beta = 0 ignores it."""
    if "beta" not in call.arguments or call["beta"] == 0:
        return None
    node: Node = call["self"]
    return node


def _of_added(call: Call, labels: tuple[list[Labels], Labels], added: Node | None) -> Labels:
    if added is None:
        return ()
    return labels[0][call.position("self" if "beta" in call.arguments else "bias")]


def _ruled(node: Node) -> tuple[Call, tuple[list[Labels], Labels]]:
    rule = find_rule(node.target)
    assert rule is not None, f"{node.target} has a row in the axis table"
    call = Call(node)
    axes = rule(call)
    return call, ([x if x is not None else () for x in axes.operands], axes.results[0])


def _einsum(node: Node) -> Product | None:
    call, (operands, result) = _ruled(node)
    if len(call.operands) != 2 or any(n.startswith("out.") for dim in result for n in dim):
        return None
    return Product(
        node=node, factors=(call.operands[0], call.operands[1]), places=(0, 1),
        labels=(operands[0], operands[1]), result=result,
    )  # fmt: skip


def _sum_of_products(node: Node) -> Product | None:
    """``(a * b).sum(dims)`` where something is summed that both have."""
    source: Any = node.args[0]
    if not isinstance(source, Node) or source.target is not aten.mul.Tensor:
        return None
    a, b = source.args
    dims = Call(node)["dim"]
    if len(source.users) != 1 or not (isinstance(a, Node) and isinstance(b, Node) and dims):
        return None
    whole = source.meta["val"].shape
    summed = {d % len(whole) for d in dims}
    labels = tuple(broadcast(n.meta["val"].shape, whole) for n in (a, b))
    if not all(_names(x) & {f"d{d}" for d in summed} for x in labels):
        return None
    every = broadcast(whole, whole)
    keepdim = Call(node)["keepdim"]
    result = tuple(
        () if d in summed else label for d, label in enumerate(every) if keepdim or d not in summed
    )
    return Product(
        node=node, factors=(a, b), places=(0, 1), labels=(labels[0], labels[1]), result=result,
        inner=source,
    )  # fmt: skip


def _names(labels: Labels) -> set[str]:
    return {name for dim in labels for name in dim}
