"""One call of the global program as one rank makes it."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from ringfx import collectives
from ringfx.passes.axes.call import Call, OpAxes
from ringfx.passes.place import Carried, Placement
from ringfx.passes.place.modes import Form, Split
from ringfx.passes.rewrite.crossings import Crossings

__all__ = ["local_call", "local_shape"]

aten = torch.ops.aten


def local_call(
    graph: Graph,
    placement: Placement,
    node: Node,
    mode: Split | None,
    operands: list[Node],
    crossings: Crossings,
) -> Node:
    """Emit the call on converted operands; reshape arguments and sums become local ones."""
    if mode is None or node not in placement.lines.axes.ops:
        return _copy(graph, node, operands)
    axes = placement.lines.axes.ops[node].axes
    if axes.regroup:
        shape = local_shape(placement, node)
        return graph.call_function(aten.reshape.default, (operands[0], list(shape)))
    if mode.partial and axes.pick is not None:
        return _pick(graph, placement, node, axes.pick, operands[0], crossings)
    if mode.partial:
        operands = _filled(graph, placement, node, axes, mode, operands, crossings)
        if axes.mean:
            return _mean(graph, placement, node, operands[0], crossings)
        return crossings.reduce(node, _copy(graph, node, operands))
    new = _copy(graph, node, operands)
    if axes.size_arg is not None:
        _set_argument(new, node, axes.size_arg, list(local_shape(placement, node)))
    return new


def local_shape(placement: Placement, node: Node, index: int = 0) -> tuple[int, ...]:
    """The shape on one rank of a value that lives split."""
    value = node.meta["val"]
    value = value if isinstance(value, torch.Tensor) else value[index]
    carried = placement.lines.carried(node, index)
    shape = [int(s) for s in value.shape]
    if isinstance(carried, Carried):
        tokens = placement.lines.lines[carried.line].layout.local_length
        shape[carried.dim] = carried.outer * tokens * carried.inner
    return tuple(shape)


def _copy(graph: Graph, node: Node, operands: list[Node]) -> Node:
    replacements = iter(operands)
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: next(replacements))
    return graph.create_node(node.op, node.target, args, kwargs)


def _set_argument(new: Node, node: Node, name: str, value: Any) -> None:
    if name in new.kwargs:
        new.kwargs = {**new.kwargs, name: value}
        return
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    new.update_arg(names.index(name), value)


def _filled(
    graph: Graph,
    placement: Placement,
    node: Node,
    axes: OpAxes,
    mode: Split,
    operands: list[Node],
    crossings: Crossings,
) -> list[Node]:
    """Operands of a sum, with padded tokens at the value that adds nothing."""
    result = list(operands)
    for i, value in enumerate(placement.lines.axes.ops[node].call.operands):
        carried = placement.lines.carried(value)
        if i not in axes.fill or mode.operands[i] is not Form.SPLIT:
            continue
        assert isinstance(carried, Carried)
        if placement.lines.lines[carried.line].has_padding(carried.member):
            where = (carried.dim, carried.outer, carried.inner)
            valid = crossings.valid(carried)
            args = (operands[i], valid, axes.fill[i], *where)
            result[i] = graph.call_function(collectives.mask_tokens, args)
    return result


def _pick(
    graph: Graph,
    placement: Placement,
    node: Node,
    element: int,
    operand: Node,
    crossings: Crossings,
) -> Node:
    """One token of a split value: its owner's row, summed with zeros of the others."""
    carried = placement.lines.carried(Call(node).operands[0])
    assert isinstance(carried, Carried)
    where = (element, carried.dim, carried.outer, carried.inner)
    own = crossings.own(carried)
    row = graph.call_function(collectives.pick_token, (operand, own, *where))
    if node.meta["val"].dim() == Call(node).operands[0].meta["val"].dim():  # a slice keeps it
        row = graph.call_function(aten.unsqueeze.default, (row, carried.dim))
    return crossings.reduce(node, row)


def _mean(
    graph: Graph, placement: Placement, node: Node, operand: Node, crossings: Crossings
) -> Node:
    """A mean over tokens: the sum over ranks, divided by the global count."""
    call = Call(node)
    shape, result = call.shapes[0], call.result_shape
    count = shape.numel() // max(result.numel(), 1)
    dtype = {"dtype": call["dtype"]} if call.get("dtype") is not None else {}
    if "dim" in call.arguments and call["dim"] is not None:
        args = (operand, call["dim"], call["keepdim"])
        total = graph.call_function(aten.sum.dim_IntList, args, dtype)
    else:
        total = graph.call_function(aten.sum.default, (operand,), dtype)
    return graph.call_function(aten.div.Scalar, (crossings.reduce(node, total), count))
