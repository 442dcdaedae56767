"""Reading at computed indices, joining values, and writing into parts of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from ringfx.ir.tiles import TRUE, Expr, const, inputs_used
from ringfx.passes.axes.call import Call
from ringfx.passes.exprs.elements.rule import Index, Rules, rows, typed

if TYPE_CHECKING:
    from ringfx.passes.exprs.lift import Lifter

__all__ = ["RULES"]

aten = torch.ops.aten


def advanced_index(lifter: Lifter, call: Call, index: Index) -> Expr | None:
    """x[i, :, j]: indices are elements themselves; theirs stand where the first one stood.

    With something between them they stand in front, as numpy has it.
    """
    source, given = call["self"], list(call["indices"])
    shape = call.shape("self")
    given += [None] * (len(shape) - len(given))
    dims = [d for d, i in enumerate(given) if i is not None]
    if not dims or any(given[d].meta["val"].dtype in (torch.bool, torch.uint8) for d in dims):
        return None
    picked = len(index) - (len(shape) - len(dims))
    adjacent = dims == list(range(dims[0], dims[-1] + 1))
    first = dims[0] if adjacent else 0
    places, rest = index[first : first + picked], iter(index[:first] + index[first + picked :])
    read = [
        next(rest) if i is None else lifter.inside(source, lifter.aligned(i, places), int(shape[d]))
        for d, i in enumerate(given)
    ]
    return lifter.element(source, tuple(read))


def index_select(lifter: Lifter, call: Call, index: Index) -> Expr:
    at = call["dim"] % max(len(index), 1)
    chosen = lifter.aligned(call["index"], (index[at],))
    return lifter.element(call["self"], (*index[:at], chosen, *index[at + 1 :]))


def gather(lifter: Lifter, call: Call, index: Index) -> Expr:
    at = call["dim"] % max(len(index), 1)
    chosen = lifter.element(call["index"], index)
    return lifter.element(call["self"], (*index[:at], chosen, *index[at + 1 :]))


def take_along_dim(lifter: Lifter, call: Call, index: Index) -> Expr | None:
    if call["dim"] is None:
        return None
    at = call["dim"] % max(len(index), 1)
    size = int(call.shape("self")[at])
    chosen = lifter.inside(call["self"], lifter.aligned(call["indices"], index), size)
    places = [
        e if d == at or s != 1 else const(0)
        for d, (e, s) in enumerate(zip(index, call.shape("self"), strict=True))
    ]
    return lifter.element(call["self"], (*places[:at], chosen, *places[at + 1 :]))


def embedding(lifter: Lifter, call: Call, index: Index) -> Expr:
    row = lifter.element(call["indices"], index[:-1])
    return lifter.element(call["weight"], (row, index[-1]))


def take(lifter: Lifter, call: Call, index: Index) -> Expr | None:
    if len(call.shape("self")) != 1:
        return None
    size = int(call.shape("self")[0])
    place = lifter.inside(call["self"], lifter.element(call["index"], index), size)
    return lifter.element(call["self"], (place,))


def guarded(lifter: Lifter, place: Expr, size: int, element: Callable[[Expr], Expr]) -> Expr:
    """``element(place)`` where place is inside [0, size); anything elsewhere, but readable."""
    found = element(place)
    ends = lifter.ends(place)
    if not inputs_used(found) or (ends and ends[0] >= 0 and ends[1] < size):
        return found
    low = lifter.make("max", place, const(0))
    return element(lifter.make("min", low, const(size - 1)))


def joined(
    lifter: Lifter, place: Expr, parts: Sequence[tuple[int, Callable[[Expr], Expr]]]
) -> Expr:
    """An element of parts that stand one behind the other, each of a size."""
    parts = [p for p in parts if p[0]]
    starts = [sum(size for size, _ in parts[:i]) for i in range(len(parts))]
    found: Expr | None = None
    for start, (size, element) in reversed(list(zip(starts, parts, strict=True))):
        inside = lifter.make("lt", place, const(start + size))
        here = guarded(lifter, lifter.make("sub", place, const(start)), size, element)
        found = here if found is None else lifter.make("where", inside, here, found)
    assert found is not None, "a tensor of no elements has no element"
    return found


def _along(lifter: Lifter, value: Node, index: Index, at: int) -> Callable[[Expr], Expr]:
    return lambda e: lifter.element(value, (*index[:at], e, *index[at + 1 :]))


def _sized(lifter: Lifter, value: Node, index: Index, at: int) -> tuple[int, Any]:
    return int(value.meta["val"].shape[at]), _along(lifter, value, index, at)


def cat(lifter: Lifter, call: Call, index: Index) -> Expr:
    at = call["dim"] % len(index)
    values = [v for v in call["tensors"] if len(v.meta["val"].shape) == len(index)]
    return joined(lifter, index[at], [_sized(lifter, v, index, at) for v in values])


def stack(lifter: Lifter, call: Call, index: Index) -> Expr:
    at = call["dim"] % len(index)
    rest = index[:at] + index[at + 1 :]
    parts = [(1, lambda e, v=v: lifter.element(v, rest)) for v in call["tensors"]]
    return joined(lifter, index[at], parts)


def diff(lifter: Lifter, call: Call, index: Index) -> Expr | None:
    """First differences along a dimension, of the value between what is put before and after."""
    if call["n"] != 1:
        return None
    at = call["dim"] % len(index)
    names = ("prepend", "self", "append")
    parts = [_sized(lifter, call[n], index, at) for n in names if call[n] is not None]
    later = joined(lifter, lifter.make("add", index[at], const(1)), parts)
    earlier = joined(lifter, index[at], parts)
    head = "xor" if call.node.meta["val"].dtype == torch.bool else "sub"
    return lifter.make(head, later, earlier)


def pad(lifter: Lifter, call: Call, index: Index) -> Expr | None:
    """Constant padding, which may also crop."""
    if call.get("mode", "constant") != "constant":
        return None
    shape, inside = call.shape("self"), TRUE
    places = list(index)
    amounts = list(call["pad"])
    for i, left in enumerate(amounts[::2]):
        at = len(index) - 1 - i
        place = lifter.make("sub", places[at], const(left))
        after = lifter.make("ge", place, const(0))
        before = lifter.make("lt", place, const(int(shape[at])))
        inside = lifter.make("and", inside, lifter.make("and", after, before))
        places[at] = place
    value = typed(call["value"] or 0, call.node.meta["val"].dtype)
    found = lifter.element(call["self"], tuple(places))
    if inputs_used(found):
        found = lifter.element(call["self"], tuple(_clamped(lifter, places, shape)))
    return lifter.make("where", inside, found, value)


def _clamped(lifter: Lifter, places: Sequence[Expr], shape: Sequence[int]) -> list[Expr]:
    return [
        lifter.make("min", lifter.make("max", p, const(0)), const(int(s) - 1))
        for p, s in zip(places, shape, strict=True)
    ]


def slice_scatter(lifter: Lifter, call: Call, index: Index) -> Expr | None:
    """The source within the slice, the value itself elsewhere."""
    if call["step"] != 1:
        return None
    at = call["dim"] % len(index)
    size = int(call.shape("self")[at])
    start = call["start"] or 0
    start = min(max(0, start + size if start < 0 else start), size)
    length = int(call.shape("src")[at])
    if length == 0:
        return lifter.element(call["self"], index)
    place = lifter.make("sub", index[at], const(start))
    written = guarded(lifter, place, length, _along(lifter, call["src"], index, at))
    after = lifter.make("ge", place, const(0))
    before = lifter.make("lt", place, const(length))
    inside = lifter.make("and", after, before)
    return lifter.make("where", inside, written, lifter.element(call["self"], index))


def select_scatter(lifter: Lifter, call: Call, index: Index) -> Expr:
    at = call["dim"] % len(index)
    chosen = const(call["index"] % int(call.shape("self")[at]))
    inside = lifter.make("eq", index[at], chosen)
    written = lifter.element(call["src"], index[:at] + index[at + 1 :])
    return lifter.make("where", inside, written, lifter.element(call["self"], index))


def copy(lifter: Lifter, call: Call, index: Index) -> Expr | None:
    if call["src"].meta["val"].dtype != call["self"].meta["val"].dtype:
        return None
    return lifter.aligned(call["src"], index)


def product(names: tuple[str, str]) -> Any:
    """A product that contracts one number: an outer product written as a matmul."""

    def rule(lifter: Lifter, call: Call, index: Index) -> Expr | None:
        left, right = (call[n] for n in names)
        a, b = call.shape(names[0]), call.shape(names[1])
        if len(a) < 2 or len(b) < 2 or a[-1] != 1:
            return None
        zero = const(0)
        x = lifter.aligned(left, (*index[:-1], zero))
        y = lifter.aligned(right, (*index[:-2], zero, index[-1]))
        return lifter.make("mul", x, y)

    return rule


def outer(lifter: Lifter, call: Call, index: Index) -> Expr:
    x = lifter.element(call["self"], (index[0],))
    names = ("vec2", "other")
    other = next(call[n] for n in names if n in call.arguments)
    return lifter.make("mul", x, lifter.element(other, (index[1],)))


RULES: Rules = {
    aten.index.Tensor: advanced_index,
    aten.index_select.default: index_select,
    aten.gather.default: gather,
    aten.take_along_dim.default: take_along_dim,
    aten.embedding.default: embedding,
    aten.take.default: take,
    **rows(cat, aten.cat.default, aten.concat.default, aten.concatenate.default),
    aten.stack.default: stack,
    aten.diff.default: diff,
    **rows(pad, aten.constant_pad_nd.default, aten.pad.default),
    aten.slice_scatter.default: slice_scatter,
    aten.select_scatter.default: select_scatter,
    aten.copy.default: copy,
    **rows(product(("self", "mat2")), aten.bmm.default, aten.mm.default),
    aten.matmul.default: product(("self", "other")),
    **rows(outer, aten.outer.default, aten.ger.default),
}  # fmt: skip
