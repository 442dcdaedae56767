"""Values made from nothing but numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from ringfx.ir.tiles import Expr, const
from ringfx.passes.axes.call import Call
from ringfx.passes.exprs.elements.rule import ElementRule, Index, Rules, rows, typed

if TYPE_CHECKING:
    from ringfx.passes.exprs.lift import Lifter

__all__ = ["RULES"]

aten = torch.ops.aten


def full(name: str) -> ElementRule:
    def rule(lifter: Lifter, call: Call, index: Index) -> Expr | None:
        value = call[name]
        if isinstance(value, Node):
            return lifter.element(value, ())
        return typed(value, call.node.meta["val"].dtype)

    return rule


def filled(value: float) -> ElementRule:
    return lambda lifter, call, index: typed(value, call.node.meta["val"].dtype)


def arange(lifter: Lifter, call: Call, index: Index) -> Expr | None:
    start, step = call.get("start", 0), call.get("step", 1)
    dtype = call.node.meta["val"].dtype
    if dtype.is_floating_point and not (float(start).is_integer() and float(step).is_integer()):
        return None
    name = {torch.float32: "float", torch.float64: "double"}.get(dtype)
    if dtype.is_floating_point and name is None:
        return None
    scaled = lifter.make("mul", index[0], const(int(step)))
    place = lifter.make("add", scaled, const(int(start)))
    return place if name is None else lifter.make(name, place)


def eye(lifter: Lifter, call: Call, index: Index) -> Expr:
    dtype = call.node.meta["val"].dtype
    same = lifter.make("eq", index[0], index[1])
    return lifter.make("where", same, typed(1, dtype), typed(0, dtype))


RULES: Rules = {
    **rows(full("fill_value"), aten.full.default, aten.new_full.default, aten.full_like.default),
    **rows(full("value"), aten.fill.Scalar, aten.fill.Tensor),
    **rows(full("s"), aten.scalar_tensor.default),
    **rows(filled(1), aten.ones.default, aten.new_ones.default, aten.ones_like.default),
    **rows(
        filled(0), aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default,
        aten.zero.default,
    ),
    **rows(arange, aten.arange.default, aten.arange.start, aten.arange.start_step),
    **rows(eye, aten.eye.default, aten.eye.m),
}  # fmt: skip
