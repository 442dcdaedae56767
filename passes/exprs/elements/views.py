"""Views: an element of the result is one element of the operand, at other indices."""

from __future__ import annotations

import math
from collections.abc import Sequence
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


def _placed(index: Index, dim: int, expr: Expr) -> Index:
    return (*index[:dim], expr, *index[dim + 1 :])


def expand(lifter: Lifter, call: Call, index: Index) -> Expr:
    return lifter.aligned(call["self"], index)


def unsqueeze(lifter: Lifter, call: Call, index: Index) -> Expr:
    at = call["dim"] % len(index)
    return lifter.element(call["self"], index[:at] + index[at + 1 :])


def transpose(lifter: Lifter, call: Call, index: Index) -> Expr:
    places = list(index)
    names = ("dim0", "dim1") if "dim0" in call.arguments else ("axis0", "axis1")
    a, b = (call[n] % len(index) for n in names)
    places[a], places[b] = places[b], places[a]
    return lifter.element(call["self"], tuple(places))


def swap_last(lifter: Lifter, call: Call, index: Index) -> Expr:
    return lifter.element(call["self"], (*index[:-2], *index[:-3:-1]))


def reverse(lifter: Lifter, call: Call, index: Index) -> Expr:
    return lifter.element(call["self"], index[::-1])


def permute(lifter: Lifter, call: Call, index: Index) -> Expr:
    places: list[Expr] = list(index)
    for i, d in enumerate(call["dims"]):
        places[d % len(index)] = index[i]
    return lifter.element(call["self"], tuple(places))


def reshape(lifter: Lifter, call: Call, index: Index) -> Expr | None:
    """Merged dimensions are one linear index, split ones its quotients and remainders."""
    before, after = [int(s) for s in call.shapes[0]], [int(s) for s in call.result_shape]
    if 0 in before:
        return None
    places: list[Expr] = []
    taken = 0
    for old, new in _groups(before, after):
        part = index[taken : taken + len(new)]
        taken += len(new)
        places += part if old == new else _unravelled(lifter, _ravelled(lifter, part, new), old)
    return lifter.element(call.operands[0], tuple(places))


def _groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The shortest runs of dimensions of equal products, in order."""
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        old, new = list(before[i : i + 1]), list(after[j : j + 1])
        while math.prod(old) != math.prod(new):
            shorter, sizes = (old, before[i + len(old) :]), (new, after[j + len(new) :])
            grown, rest = shorter if math.prod(old) < math.prod(new) else sizes
            grown.append(rest[0])
        i, j = i + len(old), j + len(new)
        found.append((old, new))
    return found


def _ravelled(lifter: Lifter, index: Sequence[Expr], sizes: Sequence[int]) -> Expr:
    total = const(0)
    for expr, size in zip(index, sizes, strict=True):
        total = lifter.make("mul", total, const(size))
        total = total if size == 1 else lifter.make("add", total, expr)
    return total


def _unravelled(lifter: Lifter, linear: Expr, sizes: Sequence[int]) -> list[Expr]:
    places: list[Expr] = []
    for size in reversed(sizes):
        is_last = math.prod(sizes) == size
        rest = linear if is_last else lifter.make("mod", linear, const(size))
        places.append(const(0) if size == 1 else rest)
        linear = lifter.make("floordiv", linear, const(size))
    return places[::-1]


def slice_(lifter: Lifter, call: Call, index: Index) -> Expr:
    at = call["dim"] % len(index)
    size = int(call.shapes[0][at])
    start = call["start"] or 0
    start = min(max(0, start + size if start < 0 else start), size)
    stepped = lifter.make("mul", index[at], const(call["step"]))
    moved = lifter.make("add", stepped, const(start))
    return lifter.element(call["self"], _placed(index, at, moved))


def select(lifter: Lifter, call: Call, index: Index) -> Expr:
    shape = call.shapes[0]
    at = call["dim"] % len(shape)
    chosen = const(call["index"] % int(shape[at]))
    return lifter.element(call["self"], (*index[:at], chosen, *index[at:]))


def getitem(lifter: Lifter, call: Call, index: Index) -> Expr | None:
    """One of the parts of split, chunk or unbind."""
    source, number = call.node.args[0], call.node.args[1]
    if not isinstance(source, Node) or not isinstance(number, int):
        return None
    made = Call(source)
    values = source.meta.get("val")
    if source.target not in _SPLITS or not isinstance(values, (tuple, list)):
        return None
    number %= len(values)
    rank = len(made.shapes[0])
    at = made["dim"] % rank
    if source.target is aten.unbind.int:
        return lifter.element(made["self"], (*index[:at], const(number), *index[at:]))
    start = sum(int(v.shape[at]) for v in values[:number])
    moved = lifter.make("add", index[at], const(start))
    return lifter.element(made["self"], _placed(index, at, moved))


_SPLITS = frozenset({
    aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.chunk.default,
    aten.unbind.int, aten.unsafe_split.Tensor, aten.unsafe_chunk.default,
    aten.tensor_split.sections,
})  # fmt: skip


def flip(lifter: Lifter, call: Call, index: Index) -> Expr:
    for dim in call["dims"]:
        at = dim % len(index)
        last = const(int(call.shapes[0][at]) - 1)
        index = _placed(index, at, lifter.make("sub", last, index[at]))
    return lifter.element(call["self"], index)


def roll(lifter: Lifter, call: Call, index: Index) -> Expr | None:
    if not call["dims"]:
        return None
    for shift, dim in zip(call["shifts"], call["dims"], strict=True):
        at = dim % len(index)
        size = const(int(call.shapes[0][at]))
        moved = lifter.make("sub", index[at], const(shift))
        index = _placed(index, at, lifter.make("mod", moved, size))
    return lifter.element(call["self"], index)


def repeat(lifter: Lifter, call: Call, index: Index) -> Expr:
    shape = call.shape("self")
    own = index[len(index) - len(shape) :]
    wrapped = [lifter.make("mod", e, const(int(s))) for e, s in zip(own, shape, strict=True)]
    return lifter.element(call["self"], tuple(wrapped))


def repeat_interleave(lifter: Lifter, call: Call, index: Index) -> Expr | None:
    if call["dim"] is None:
        return None
    at = call["dim"] % len(index)
    group = lifter.make("floordiv", index[at], const(call["repeats"]))
    return lifter.element(call["self"], _placed(index, at, group))


def unfold(lifter: Lifter, call: Call, index: Index) -> Expr:
    at = call["dimension"] % (len(index) - 1)
    start = lifter.make("mul", index[at], const(call["step"]))
    return lifter.element(
        call["self"], _placed(index[:-1], at, lifter.make("add", start, index[-1]))
    )


def diagonal(lifter: Lifter, call: Call, index: Index) -> Expr:
    """The result's last dimension runs along dim1 and dim2 together."""
    rank = len(index) + 1
    a, b, offset = call["dim1"] % rank, call["dim2"] % rank, call["offset"]
    along = {
        a: lifter.make("add", index[-1], const(max(0, -offset))),
        b: lifter.make("add", index[-1], const(max(0, offset))),
    }
    rest = iter(index[:-1])
    return lifter.element(
        call["self"], tuple(along[d] if d in along else next(rest) for d in range(rank))
    )


def triangle(comparison: str) -> ElementRule:
    def rule(lifter: Lifter, call: Call, index: Index) -> Expr:
        row = lifter.make("add", index[-2], const(call["diagonal"]))
        inside = lifter.make(comparison, index[-1], row)
        return lifter.make(
            "where",
            inside,
            lifter.element(call["self"], index),
            typed(0, call.node.meta["val"].dtype),
        )

    return rule


RULES: Rules = {
    **rows(expand, aten.expand.default, aten.expand_as.default, aten.broadcast_to.default),
    aten.unsqueeze.default: unsqueeze,
    **rows(transpose, aten.transpose.int, aten.swapaxes.default, aten.swapdims.default),
    **rows(swap_last, aten.t.default, aten.mT.default, aten.adjoint.default),
    aten.numpy_T.default: reverse,
    aten.permute.default: permute,
    **rows(
        reshape, aten.view.default, aten.reshape.default, aten.squeeze.dim, aten.squeeze.dims,
        aten.squeeze.default, aten._unsafe_view.default, aten.flatten.using_ints,
        aten.unflatten.int, aten.view_as.default, aten.reshape_as.default, aten.ravel.default,
    ),
    aten.slice.Tensor: slice_,
    aten.select.int: select,
    **rows(flip, aten.flip.default),
    aten.roll.default: roll,
    aten.repeat.default: repeat,
    aten.repeat_interleave.self_int: repeat_interleave,
    aten.unfold.default: unfold,
    aten.diagonal.default: diagonal,
    aten.tril.default: triangle("le"),
    aten.triu.default: triangle("ge"),
}  # fmt: skip
