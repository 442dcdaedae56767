"""Scores of which a slice has something added in place: a sum with what is zero elsewhere.

Behind a class token, relative positions are added to ``scores[:, :, 1:, 1:]`` alone, often in a
view of it. As a program of values that is ``slice_scatter(s, slice(s) + b)``, which is no
elementwise call. It is ``s + pad(b)``, whose second part is a bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.nn import functional as F

from ringfx.passes.axes.call import Call
from ringfx.passes.capture.simplify import eliminate_dead
from ringfx.passes.detect.inline_kernel_calls import inline
from ringfx.passes.detect.pairs import leads_to_softmax

__all__ = ["add_slices"]

aten = torch.ops.aten
RESHAPES = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default})
COPIES = frozenset({aten.clone.default, aten.contiguous.default, aten.alias.default})


@dataclass(frozen=True, eq=False)
class _Added:
    """A value that is added, and its shape then."""

    value: Node
    shape: tuple[int, ...]


def add_slices(graph: Graph) -> None:
    """Rewrite every such write before a softmax; the program computes the same."""
    for node in graph.find_nodes(op="call_function", target=aten.slice_scatter.default):
        if not leads_to_softmax(_outermost(node), lambda n: iter(n.users)):
            continue
        call = Call(node)
        found = _added(call["src"], call) if call["step"] == 1 else None
        if found:
            given: dict[str, Any] = {f"b{i}": x.value for i, x in enumerate(found)}
            made = inline(node, _sum(call, [x.shape for x in found]), named=False,
                          x=call["self"], **given)  # fmt: skip
            node.replace_all_uses_with(made)
            eliminate_dead(graph)  # a slice that is not read any more is no user of the scores


def _outermost(node: Node) -> Node:
    """The write that it is a part of: of a slice of a slice."""
    outer = next((n for n in node.users if n.target is node.target), None)
    return node if outer is None else _outermost(outer)


def _sum(call: Call, shapes: Sequence[tuple[int, ...]]) -> Any:
    size = call.shape("self")
    dim = call.dim("dim", len(size))
    start, stop, _ = slice(call["start"], call["end"]).indices(size[dim])
    part = tuple(int(n) for n in call.shape("src"))
    amounts = [0, 0] * (len(size) - 1 - dim) + [start, size[dim] - stop]

    def run(x: Tensor, **added: Tensor) -> Tensor:
        total = None
        for i, shape in enumerate(shapes):
            one = added[f"b{i}"].expand(shape).reshape(part)
            total = one if total is None else total + one
        assert total is not None
        return x + F.pad(total, amounts)

    return run


def _added(value: Node, write: Call) -> list[_Added] | None:
    """What is added to the slice that is written, where that is all that is done to it; none."""
    if value.target is aten.slice.Tensor:
        return [] if _is_read_where(Call(value), write) else None
    if value.target in RESHAPES or value.target in COPIES:
        return _added(Call(value).operands[0], write)
    if value.target is not aten.add.Tensor or Call(value)["alpha"] != 1:
        return None
    shape = tuple(int(n) for n in value.meta["val"].shape)
    for base, other in (value.args, value.args[::-1]):
        if not (isinstance(base, Node) and isinstance(other, Node)):
            return None
        same = tuple(base.meta["val"].shape) == shape and _same_type(base, other, value)
        before = _added(base, write) if same else None
        if before is not None:
            return [*before, _Added(other, shape)]
    return None


def _same_type(*values: Node) -> bool:
    return len({n.meta["val"].dtype for n in values}) == 1


def _is_read_where(read: Call, write: Call) -> bool:
    """Whether a slice is what the write takes the place of."""
    size = write.shape("self")
    return (
        _is_same(read["self"], write["self"])
        and read["step"] == 1
        and read.dim("dim", len(size)) == write.dim("dim", len(size))
        and _bounds(read, size) == _bounds(write, size)
    )


def _bounds(call: Call, size: torch.Size) -> tuple[int, int]:
    length = size[call.dim("dim", len(size))]
    return slice(call["start"], call["end"]).indices(length)[:2]


def _is_same(a: Node, b: Node) -> bool:
    """Whether two values are one, or the same slice of one."""
    if a is b or a.target is not aten.slice.Tensor or b.target is not aten.slice.Tensor:
        return a is b
    one, other = Call(a), Call(b)
    size = one.shape("self")
    return (
        _is_same(one["self"], other["self"])
        and one.dim("dim", len(size)) == other.dim("dim", len(size))
        and (one["step"], *_bounds(one, size)) == (other["step"], *_bounds(other, size))
    )
