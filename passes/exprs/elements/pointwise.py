"""Operators that combine the elements at one index."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ringfx.ir.tiles import Expr, const
from ringfx.passes.axes.call import Call
from ringfx.passes.capture.gradients import needs_grad
from ringfx.passes.exprs.elements.rule import ElementRule, Index, Rules, rows, typed
from ringfx.passes.exprs.simplify import is_choice, leaves, on_leaves

if TYPE_CHECKING:
    from ringfx.passes.exprs.lift import Lifter

__all__ = ["RULES"]

aten = torch.ops.aten

_CASTS: Mapping[torch.dtype, str] = {
    torch.bool: "bool", torch.int64: "int", torch.int32: "int", torch.int16: "int",
    torch.int8: "int", torch.uint8: "int", torch.float32: "float", torch.float64: "double",
    torch.float16: "half", torch.bfloat16: "bfloat16",
}  # fmt: skip
_NAMED_ALIKE = (
    "neg", "abs", "exp", "log", "log2", "log1p", "sqrt", "rsqrt", "reciprocal", "tanh", "sigmoid",
    "relu", "sin", "cos", "floor", "ceil", "round", "isinf", "isnan",
)  # fmt: skip
"""Functions of one number that torch and TILE_OPS call by the same name."""
_LOGICAL = {"add": "or", "mul": "and", "max": "or", "min": "and"}
"""Arithmetic on booleans."""
_NARROW = frozenset({torch.float16, torch.bfloat16})


def narrowed(expr: Expr, dtype: torch.dtype) -> Expr:
    """Rounded as a half-precision result is; tiles compute constants in float32."""
    if dtype not in _NARROW or expr[0] == _CASTS[dtype]:
        return expr
    if is_choice(expr):
        return on_leaves(lambda leaf: typed(leaf[1], dtype), expr)
    return (_CASTS[dtype], expr)


def pointwise(head: str, *names: str) -> ElementRule:
    def rule(lifter: Lifter, call: Call, index: Index) -> Expr | None:
        args = [lifter.aligned(call[name], index) for name in names]
        alpha = call.get("alpha", 1)
        if alpha != 1:
            args[1] = lifter.make("mul", args[1], const(alpha))
        dtype = call.node.meta["val"].dtype
        made = lifter.make(_LOGICAL.get(head, head) if dtype == torch.bool else head, *args)
        return narrowed(made, dtype)

    return rule


def bitwise(logical: str, integer: str | None) -> ElementRule:
    """On booleans the logical operator, on integers the one on bits."""

    def rule(lifter: Lifter, call: Call, index: Index) -> Expr | None:
        head = logical if call.node.meta["val"].dtype == torch.bool else integer
        names = [n for n in ("self", "other") if n in call.arguments]
        args = [lifter.aligned(call[n], index) for n in names]
        return None if head is None else lifter.make(head, *args)

    return rule


def same(lifter: Lifter, call: Call, index: Index) -> Expr:
    return lifter.aligned(call["self"], index)


def cast(lifter: Lifter, call: Call, index: Index) -> Expr | None:
    source, target = call["self"].meta["val"].dtype, call.node.meta["val"].dtype
    inner = lifter.aligned(call["self"], index)
    if source == target or (source.is_complex or target.is_complex):
        return inner if source == target else None
    name = _CASTS.get(target)
    if name is None or (name == "int" and not _holds(lifter, inner, target)):
        return None
    if target in _NARROW and is_choice(inner):
        return narrowed(inner, target)
    if target in _NARROW and source == torch.bool:
        return narrowed(lifter.make("float", inner), target)
    if name == "double" and any(type(leaf[1]) is float for leaf in _constants(inner)):
        return lifter.make("double", inner) if not is_choice(inner) else inner
    if name == "float" and is_choice(inner) and source.is_floating_point:
        return on_leaves(lambda leaf: typed(leaf[1], target), inner)
    return lifter.make(name, inner)


def _constants(expr: Expr) -> tuple[Expr, ...]:
    return leaves(expr) if is_choice(expr) else ()


def _holds(lifter: Lifter, expr: Expr, dtype: torch.dtype) -> bool:
    """Whether a cast to a short integer type changes nothing; positions fit 32 bits."""
    if dtype in (torch.int64, torch.int32):
        return True
    ends, limits = lifter.ends(lifter.make("int", expr)), torch.iinfo(dtype)
    return ends is not None and limits.min <= ends[0] and ends[1] <= limits.max


def where(lifter: Lifter, call: Call, index: Index) -> Expr:
    names = ("condition", "self", "other")
    found = lifter.make("where", *(lifter.aligned(call[n], index) for n in names))
    return narrowed(found, call.node.meta["val"].dtype)


def masked_fill(lifter: Lifter, call: Call, index: Index) -> Expr:
    value, dtype = call["value"], call.node.meta["val"].dtype
    filling = lifter.aligned(value, index)
    if filling[0] == "const":
        filling = typed(filling[1], dtype)
    kept = lifter.aligned(call["self"], index)
    return narrowed(lifter.make("where", lifter.aligned(call["mask"], index), filling, kept), dtype)


def clamp(lifter: Lifter, call: Call, index: Index) -> Expr:
    """A clamp that trains is told from a maximum: of two equal numbers, that one halves."""
    found, trains = lifter.aligned(call["self"], index), needs_grad(call.node)
    for name, head in (("min", "max"), ("max", "min")):
        if call.get(name) is not None:
            head = f"clamp_{name}" if trains else head
            found = lifter.make(head, found, lifter.aligned(call[name], index))
    return narrowed(found, call.node.meta["val"].dtype)


def rsub(lifter: Lifter, call: Call, index: Index) -> Expr:
    taken = lifter.make("mul", lifter.aligned(call["self"], index), const(call["alpha"]))
    found = lifter.make("sub", lifter.aligned(call["other"], index), taken)
    return narrowed(found, call.node.meta["val"].dtype)


def divide(lifter: Lifter, call: Call, index: Index) -> Expr | None:
    heads = {None: "div", "floor": "floordiv", "trunc": "truncdiv"}
    operands = (lifter.aligned(call[n], index) for n in ("self", "other"))
    found = lifter.make(heads[call.get("rounding_mode")], *operands)
    return narrowed(found, call.node.meta["val"].dtype)


def softplus(lifter: Lifter, call: Call, index: Index) -> Expr | None:
    if (call["beta"], call["threshold"]) != (1, 20):
        return None
    return pointwise("softplus", "self")(lifter, call, index)


def square(lifter: Lifter, call: Call, index: Index) -> Expr:
    value = lifter.aligned(call["self"], index)
    return narrowed(lifter.make("mul", value, value), call.node.meta["val"].dtype)


def nan_to_num(lifter: Lifter, call: Call, index: Index) -> Expr:
    value, dtype = lifter.aligned(call["self"], index), call.node.meta["val"].dtype
    if not dtype.is_floating_point:
        return value
    limits = torch.finfo(dtype)
    given = {name: call[name] for name in ("nan", "posinf", "neginf")}
    high = limits.max if given["posinf"] is None else given["posinf"]
    low = limits.min if given["neginf"] is None else given["neginf"]
    found = lifter.make("where", lifter.make("eq", value, const(float("inf"))), const(high), value)
    found = lifter.make("where", lifter.make("eq", value, const(-float("inf"))), const(low), found)
    return lifter.make("where", lifter.make("isnan", value), const(given["nan"] or 0.0), found)


def _both(head: str, *ops: Any) -> dict[object, ElementRule]:
    return rows(pointwise(head, "self", "other"), *ops)


def _one(head: str, *ops: Any) -> dict[object, ElementRule]:
    return rows(pointwise(head, "self"), *ops)


RULES: Rules = {
    **_both("add", aten.add.Tensor, aten.add.Scalar),
    **_both("sub", aten.sub.Tensor, aten.sub.Scalar),
    **_both("mul", aten.mul.Tensor, aten.mul.Scalar),
    **_both("le", aten.le.Tensor, aten.le.Scalar, aten.less_equal.Tensor, aten.less_equal.Scalar),
    **_both("lt", aten.lt.Tensor, aten.lt.Scalar, aten.less.Tensor, aten.less.Scalar),
    **_both(
        "ge", aten.ge.Tensor, aten.ge.Scalar,
        aten.greater_equal.Tensor, aten.greater_equal.Scalar,
    ),
    **_both("gt", aten.gt.Tensor, aten.gt.Scalar, aten.greater.Tensor, aten.greater.Scalar),
    **_both("eq", aten.eq.Tensor, aten.eq.Scalar),
    **_both("ne", aten.ne.Tensor, aten.ne.Scalar, aten.not_equal.Tensor),
    **_both("and", aten.logical_and.default),
    **_both("or", aten.logical_or.default),
    **_both("xor", aten.logical_xor.default),
    **_both("min", aten.minimum.default, aten.min.other),
    **_both("max", aten.maximum.default, aten.max.other),
    **_both("mod", aten.remainder.Scalar, aten.remainder.Tensor),
    **_both("fmod", aten.fmod.Scalar, aten.fmod.Tensor),
    **_both("floordiv", aten.floor_divide.default, aten.floor_divide.Scalar),
    **rows(
        pointwise("pow", "self", "exponent"),
        aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar,
    ),
    **_one("not", aten.logical_not.default),
    **_one("sign", aten.sign.default, aten.sgn.default),
    **_one("trunc", aten.trunc.default, aten.fix.default),
    **{getattr(aten, name).default: pointwise(name, "self") for name in _NAMED_ALIKE},
    **rows(divide, aten.div.Tensor, aten.div.Scalar, aten.div.Tensor_mode, aten.div.Scalar_mode),
    **rows(
        bitwise("and", "bitand"), aten.__and__.Tensor, aten.__and__.Scalar,
        aten.bitwise_and.Tensor, aten.bitwise_and.Scalar,
    ),
    **rows(
        bitwise("or", "bitor"), aten.__or__.Tensor, aten.__or__.Scalar,
        aten.bitwise_or.Tensor, aten.bitwise_or.Scalar,
    ),
    **rows(
        bitwise("xor", "bitxor"), aten.__xor__.Tensor, aten.__xor__.Scalar,
        aten.bitwise_xor.Tensor, aten.bitwise_xor.Scalar,
    ),
    **rows(bitwise("not", None), aten.bitwise_not.default),
    **rows(rsub, aten.rsub.Scalar, aten.rsub.Tensor),
    **rows(
        same, aten.contiguous.default, aten.clone.default, aten.alias.default,
        aten.positive.default, aten.detach.default, aten.lift_fresh_copy.default,
    ),
    **rows(
        cast, aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default,
        aten.type_as.default, aten.to.other,
    ),
    **rows(where, aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf),
    aten.where.Scalar: where,
    **rows(masked_fill, aten.masked_fill.Scalar, aten.masked_fill.Tensor),
    **rows(
        clamp, aten.clamp.default, aten.clamp.Tensor, aten.clamp_min.default,
        aten.clamp_max.default, aten.clamp_min.Tensor, aten.clamp_max.Tensor,
        aten.clip.default, aten.clip.Tensor,
    ),
    aten.square.default: square,
    aten.softplus.default: softplus,
    aten.nan_to_num.default: nan_to_num,
}  # fmt: skip
