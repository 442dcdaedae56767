"""One element of a graph value as an expression of its indices.

``Lifter.element(node, (e0, e1, ...))`` answers "what is node[e0, e1, ...]?" by asking the node's
operands the same question: views move indices, pointwise operators combine elements, an indexing
operator composes indices, arange is its own index. Where that ends (an input, a cumulative sum) the
value itself is captured and read with ``at``. Everything is O(1) in the sequence length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Node

from ringfx.passes.axes.call import Call
from ringfx.passes.masks.constants import fold_constant
from ringfx.passes.masks.simplify import const, simplify
from ringfx.tiles import Expr

__all__ = ["Index", "Lifter"]

aten = torch.ops.aten
Index = tuple[Expr, ...]

_CASTS: Mapping[torch.dtype, str] = {
    torch.bool: "bool", torch.int64: "int", torch.int32: "int", torch.float32: "float",
    torch.float64: "double", torch.float16: "half", torch.bfloat16: "bfloat16",
}  # fmt: skip


class Lifter:
    """Lifts values of one program; remembers which tensors the expressions capture."""

    def __init__(self) -> None:
        self.captured: list[Node] = []
        self._memo: dict[tuple[Node, Index], Expr] = {}

    def element(self, value: Any, index: Index) -> Expr:
        """``value[index]``; a Python number is itself."""
        if not isinstance(value, Node):
            return const(value)
        key = (value, index)
        if key not in self._memo:
            self._memo[key] = self._lift(value, index)
        return self._memo[key]

    def aligned(self, value: Any, index: Index) -> Expr:
        """The element of an operand that broadcasts to a result of this index."""
        if not isinstance(value, Node):
            return const(value)
        shape = value.meta["val"].shape
        own = index[len(index) - len(shape) :]
        return self.element(
            value, tuple(const(0) if s == 1 else e for s, e in zip(shape, own, strict=True))
        )

    def _lift(self, node: Node, index: Index) -> Expr:
        rule = ELEMENT_RULES.get(node.target)
        lifted = rule(self, Call(node), index) if rule is not None else None
        if lifted is None:
            lifted = fold_constant(node, index)
        return lifted if lifted is not None else self._capture(node, index)

    def _capture(self, node: Node, index: Index) -> Expr:
        if node not in self.captured:
            self.captured.append(node)
        return ("at", self.captured.index(node), *index)


ElementRule = Callable[[Lifter, Call, Index], Expr | None]


def pointwise(head: str, *names: str) -> ElementRule:
    def rule(lifter: Lifter, call: Call, index: Index) -> Expr | None:
        if call.get("alpha", 1) != 1:
            scaled = simplify("mul", lifter.aligned(call[names[1]], index), const(call["alpha"]))
            return simplify(head, lifter.aligned(call[names[0]], index), scaled)
        return simplify(head, *(lifter.aligned(call[name], index) for name in names))

    return rule


def bitwise(head: str) -> ElementRule:
    """On booleans, the logical operator; on integers there is no tile form."""

    def rule(lifter: Lifter, call: Call, index: Index) -> Expr | None:
        if call.node.meta["val"].dtype != torch.bool:
            return None
        names = [n for n in ("self", "other") if n in call.arguments]
        return simplify(head, *(lifter.aligned(call[n], index) for n in names))

    return rule


def same(lifter: Lifter, call: Call, index: Index) -> Expr:
    return lifter.aligned(call["self"], index)


def cast(lifter: Lifter, call: Call, index: Index) -> Expr | None:
    source, target = call["self"].meta["val"].dtype, call.node.meta["val"].dtype
    inner = lifter.aligned(call["self"], index)
    if source == target:
        return inner
    name = _CASTS.get(target)
    return None if name is None else simplify(name, inner)


def expand(lifter: Lifter, call: Call, index: Index) -> Expr:
    return lifter.aligned(call["self"], index)


def unsqueeze(lifter: Lifter, call: Call, index: Index) -> Expr:
    at = call["dim"] % len(index)
    return lifter.element(call["self"], index[:at] + index[at + 1 :])


def transpose(lifter: Lifter, call: Call, index: Index) -> Expr:
    places = list(index)
    a, b = call["dim0"] % len(index), call["dim1"] % len(index)
    places[a], places[b] = places[b], places[a]
    return lifter.element(call["self"], tuple(places))


def swap_last(lifter: Lifter, call: Call, index: Index) -> Expr:
    return lifter.element(call["self"], (*index[:-2], *index[:-3:-1]))


def permute(lifter: Lifter, call: Call, index: Index) -> Expr:
    places: list[Expr] = list(index)
    for i, d in enumerate(call["dims"]):
        places[d % len(index)] = index[i]
    return lifter.element(call["self"], tuple(places))


def reshape(lifter: Lifter, call: Call, index: Index) -> Expr | None:
    """Only size-1 dimensions come or go; others keep their order."""
    before, after = call.shapes[0], call.result_shape
    kept = [e for e, s in zip(index, after, strict=True) if s != 1]
    if [s for s in before if s != 1] != [s for s in after if s != 1]:
        return None
    places = iter(kept)
    return lifter.element(
        call.operands[0], tuple(next(places) if s != 1 else const(0) for s in before)
    )


def slice_(lifter: Lifter, call: Call, index: Index) -> Expr:
    size = call.shapes[0][call["dim"]]
    start = call["start"] or 0
    start = max(0, start + size if start < 0 else start)
    places = list(index)
    at = call["dim"] % len(index)
    stepped = simplify("mul", places[at], const(call["step"]))
    places[at] = simplify("add", stepped, const(start))
    return lifter.element(call["self"], tuple(places))


def select(lifter: Lifter, call: Call, index: Index) -> Expr:
    shape = call.shapes[0]
    at = call["dim"] % len(shape)
    chosen = const(call["index"] % shape[at])
    return lifter.element(call["self"], (*index[:at], chosen, *index[at:]))


def advanced_index(lifter: Lifter, call: Call, index: Index) -> Expr | None:
    """x[i, j, ...]: the indices are elements themselves."""
    given = list(call["indices"])
    if not given or any(not isinstance(i, Node) for i in given):
        return None
    if any(i.meta["val"].dtype == torch.bool for i in given):
        return None
    picked = len(index) - (len(call.shape("self")) - len(given))
    places = tuple(lifter.aligned(i, index[:picked]) for i in given)
    return lifter.element(call["self"], (*places, *index[picked:]))


def constant(lifter: Lifter, call: Call, index: Index) -> Expr | None:
    return const(_typed(call["fill_value"], call.node.meta["val"].dtype))


def filled(value: float) -> ElementRule:
    return lambda lifter, call, index: const(_typed(value, call.node.meta["val"].dtype))


def scalar(lifter: Lifter, call: Call, index: Index) -> Expr:
    return const(_typed(call["s"], call.node.meta["val"].dtype))


def _typed(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Node):
        return None
    if dtype == torch.bool:
        return bool(value)
    return float(value) if dtype.is_floating_point else int(value)


def arange(lifter: Lifter, call: Call, index: Index) -> Expr | None:
    if call.node.meta["val"].dtype.is_floating_point:
        return simplify("float", _affine_index(call, index))
    return _affine_index(call, index)


def _affine_index(call: Call, index: Index) -> Expr:
    scaled = simplify("mul", index[0], const(call.get("step", 1)))
    return simplify("add", scaled, const(call.get("start", 0)))


def where(lifter: Lifter, call: Call, index: Index) -> Expr:
    names = ("condition", "self", "other")
    return simplify("where", *(lifter.aligned(call[n], index) for n in names))


def masked_fill(lifter: Lifter, call: Call, index: Index) -> Expr:
    value = call["value"]
    number = _typed(value, call.node.meta["val"].dtype)
    filling = const(number) if number is not None else lifter.element(value, ())
    return simplify(
        "where", lifter.aligned(call["mask"], index), filling, lifter.aligned(call["self"], index)
    )


def triangle(comparison: str) -> ElementRule:
    def rule(lifter: Lifter, call: Call, index: Index) -> Expr:
        row = simplify("add", index[-2], const(call["diagonal"]))
        dtype = call.node.meta["val"].dtype
        inside = simplify(comparison, index[-1], row)
        return simplify(
            "where", inside, lifter.element(call["self"], index), const(_typed(0, dtype))
        )

    return rule


def rsub(lifter: Lifter, call: Call, index: Index) -> Expr | None:
    if call["alpha"] != 1:
        return None
    return simplify(
        "sub", lifter.aligned(call["other"], index), lifter.aligned(call["self"], index)
    )


def divide(lifter: Lifter, call: Call, index: Index) -> Expr | None:
    heads = {None: "div", "floor": "floordiv", "trunc": "truncdiv"}
    operands = (lifter.aligned(call[n], index) for n in ("self", "other"))
    return simplify(heads[call.get("rounding_mode")], *operands)


def _both(head: str, *ops: Any) -> dict[object, ElementRule]:
    return {op: pointwise(head, "self", "other") for op in ops}


def _one(head: str, *ops: Any) -> dict[object, ElementRule]:
    return {op: pointwise(head, "self") for op in ops}


def _all(rule: ElementRule, *ops: Any) -> dict[object, ElementRule]:
    return dict.fromkeys(ops, rule)


ELEMENT_RULES: Mapping[object, ElementRule] = {
    **_both("add", aten.add.Tensor, aten.add.Scalar),
    **_both("sub", aten.sub.Tensor, aten.sub.Scalar),
    **_both("mul", aten.mul.Tensor, aten.mul.Scalar),
    **_both("le", aten.le.Tensor, aten.le.Scalar, aten.less_equal.Tensor),
    **_both("lt", aten.lt.Tensor, aten.lt.Scalar, aten.less.Tensor),
    **_both("ge", aten.ge.Tensor, aten.ge.Scalar, aten.greater_equal.Tensor),
    **_both("gt", aten.gt.Tensor, aten.gt.Scalar, aten.greater.Tensor),
    **_both("eq", aten.eq.Tensor, aten.eq.Scalar),
    **_both("ne", aten.ne.Tensor, aten.ne.Scalar),
    **_both("and", aten.logical_and.default),
    **_both("or", aten.logical_or.default),
    **_both("xor", aten.logical_xor.default),
    **_both("min", aten.minimum.default, aten.clamp_max.Tensor),
    **_both("max", aten.maximum.default, aten.clamp_min.Tensor),
    **_both("mod", aten.remainder.Scalar, aten.remainder.Tensor),
    **_both("floordiv", aten.floor_divide.default, aten.floor_divide.Scalar),
    **_one("not", aten.logical_not.default),
    **_one("neg", aten.neg.default),
    **_one("abs", aten.abs.default),
    **_one("exp", aten.exp.default),
    **_one("log", aten.log.default),
    **_one("sqrt", aten.sqrt.default),
    **_all(divide, aten.div.Tensor, aten.div.Scalar, aten.div.Tensor_mode, aten.div.Scalar_mode),
    **_all(bitwise("and"), aten.__and__.Tensor, aten.bitwise_and.Tensor),
    **_all(bitwise("or"), aten.__or__.Tensor, aten.bitwise_or.Tensor),
    **_all(bitwise("xor"), aten.__xor__.Tensor, aten.bitwise_xor.Tensor),
    **_all(bitwise("not"), aten.bitwise_not.default),
    **_all(rsub, aten.rsub.Scalar, aten.rsub.Tensor),
    **_all(
        same, aten.contiguous.default, aten.clone.default, aten.alias.default,
        aten.detach.default, aten.lift_fresh_copy.default, aten.expand_as.default,
    ),
    **_all(
        cast, aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default,
        aten.type_as.default, aten.to.other,
    ),
    aten.expand.default: expand,
    aten.unsqueeze.default: unsqueeze,
    aten.transpose.int: transpose,
    aten.t.default: swap_last,
    aten.mT.default: swap_last,
    aten.permute.default: permute,
    **_all(
        reshape, aten.view.default, aten.reshape.default, aten.squeeze.dim, aten.squeeze.dims,
        aten.squeeze.default, aten._unsafe_view.default, aten.flatten.using_ints,
    ),
    aten.slice.Tensor: slice_,
    aten.select.int: select,
    aten.index.Tensor: advanced_index,
    **_all(constant, aten.full.default, aten.new_full.default, aten.full_like.default),
    **_all(filled(1), aten.ones.default, aten.new_ones.default, aten.ones_like.default),
    **_all(filled(0), aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default),
    aten.scalar_tensor.default: scalar,
    **_all(arange, aten.arange.default, aten.arange.start, aten.arange.start_step),
    **_all(where, aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf),
    aten.where.Scalar: where,
    **_all(masked_fill, aten.masked_fill.Scalar, aten.masked_fill.Tensor),
    aten.tril.default: triangle("le"),
    aten.triu.default: triangle("ge"),
}  # fmt: skip
