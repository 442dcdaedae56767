"""One call of the global program as one rank makes it."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from ringfx.comm import conjugate, halo, random_draws, redistribute, token_lookup
from ringfx.passes.axes.call import Call, OpAxes
from ringfx.passes.capture.gradients import needs_grad
from ringfx.passes.capture.origin import describe_node
from ringfx.passes.place import Placement
from ringfx.passes.place.split_modes import Form, Lookup, Reach, Split, Turn
from ringfx.passes.rewrite.crossings import Crossings, is_narrow
from ringfx.passes.token_axes import Carried
from ringfx.torch_compat.operators import schema_of

__all__ = ["local_call", "local_shape", "shifted"]

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
    if node.target is redistribute.relay:
        return _relay(graph, placement, node, mode, operands[0], crossings)
    if axes.regroup:
        shape = local_shape(placement, node)
        return graph.call_function(aten.reshape.default, (operands[0], list(shape)))
    if axes.draws:
        return _draw(graph, placement, node, operands[0], crossings)
    if mode.inverts:
        order = operands[1 if node.target is aten.index_put.default else 0]
        return graph.call_function(aten.argsort.default, (order,))
    if mode.reach is not None:
        return _convolve(graph, placement, node, mode.reach, operands, crossings)
    if mode.turn is not None:
        return _turn(graph, placement, node, mode.turn, operands[0], crossings)
    if mode.looked_up is not None:
        return _look_up(graph, placement, node, mode.looked_up, operands, crossings)
    if mode.pieces:
        return _join(graph, placement, node, mode, operands, crossings)
    if mode.partial:
        operands = _filled(graph, placement, node, axes, mode, operands, crossings)
        if axes.mean:
            return _mean(graph, placement, node, operands[0], crossings)
        return crossings.reduce(node, _partial(graph, node, operands))
    new = _copy(graph, node, operands)
    if axes.size_arg is not None:
        _set_argument(new, node, axes.size_arg, list(local_shape(placement, node)))
    return new


def _draw(
    graph: Graph, placement: Placement, node: Node, operand: Node, crossings: Crossings
) -> Node:
    """This rank's part of the whole tensor's random numbers."""
    carried = placement.lines.carried(node)
    assert isinstance(carried, Carried)
    call = Call(node)
    like = call.operands[0].meta["val"]
    index = crossings.index(carried)
    where = (list(like.shape), list(like.stride()), carried.dim, carried.outer, carried.inner)
    if node.target is aten.dropout.default:
        return graph.call_function(random_draws.dropout, (operand, index, call["p"], *where))
    settings: tuple[Any, ...] = (node.target, list(node.args[1:]), dict(node.kwargs))
    return graph.call_function(random_draws.draw, (operand, index, *settings, *where))


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
    names = [a.name for a in schema_of(node.target).arguments]
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
            result[i] = graph.call_function(conjugate.mask_tokens, args)
    return result


def shifted(
    graph: Graph,
    placement: Placement,
    node: Node,
    mode: Split,
    operands: list[Node],
    crossings: Crossings,
) -> list[Node]:
    """Operands moved by a few positions, the tokens at the borders from their neighbours."""
    result = list(operands)
    for i, (value, shift) in enumerate(zip(Call(node).operands, mode.shifts, strict=True)):
        if not shift:
            continue
        carried = placement.lines.carried(value)
        assert isinstance(carried, Carried)
        _report_borders(placement, node, value, carried, abs(shift), crossings)
        chunks = placement.lines.lines[carried.line].layout.chunks_per_rank
        moved_to = placement.lines.carried(node)
        assert isinstance(moved_to, Carried)
        where = (chunks, crossings.group, carried.dim, carried.outer, carried.inner)
        args = (operands[i], shift, crossings.valid(moved_to), *where)
        result[i] = graph.call_function(halo.shift_tokens, args)
    return result


def _report_borders(
    placement: Placement,
    node: Node,
    value: Node,
    carried: Carried,
    tokens: int,
    crossings: Crossings,
) -> None:
    """Say in the plan that every chunk receives tokens of its neighbours."""
    size = _token_bytes(value, carried) * tokens
    chunks = placement.lines.lines[carried.line].layout.chunks_per_rank
    reason = f"{tokens} neighbouring tokens of each run"
    crossings.report(node, "borders", size * chunks, reason)


def _token_bytes(value: Node, carried: Carried) -> int:
    """Bytes of one of its tokens."""
    whole = value.meta["val"]
    return int(whole.numel() * whole.element_size() // max(carried.member.length, 1))


def _convolve(
    graph: Graph,
    placement: Placement,
    node: Node,
    reach: Reach,
    operands: list[Node],
    crossings: Crossings,
) -> Node:
    call = Call(node)
    carried = placement.lines.carried(call.operands[0])
    assert isinstance(carried, Carried)
    line = placement.lines.lines[carried.line]
    x, weight, *bias = operands
    if line.has_padding(carried.member):
        where = (0, carried.dim, carried.outer, carried.inner)
        x = graph.call_function(conjugate.mask_tokens, (x, crossings.valid(carried), *where))
    if reach.before or reach.after:
        tokens = reach.before + reach.after
        _report_borders(placement, node, call.operands[0], carried, tokens, crossings)
    kwargs = dict(node.kwargs) | {
        "lead": reach.lead,
        "frames": reach.frames,
        "before": reach.before,
        "after": reach.after,
        "chunks": line.layout.chunks_per_rank,
        "group": crossings.group,
        "dim": carried.dim,
    }
    given = (weight, bias[0] if bias else None)
    y = graph.call_function(halo.convolve_tokens, (x, *given), kwargs)
    result = placement.lines.carried(node)
    assert isinstance(result, Carried)
    if not placement.lines.lines[result.line].has_padding(result.member):
        return y
    place = {"dim": result.dim, "outer": result.outer, "inner": result.inner}
    args = (y, operands[0], *given, crossings.valid(result))
    return graph.call_function(halo.fill_convolved, args, dict(node.kwargs) | place)


def _relay(
    graph: Graph,
    placement: Placement,
    node: Node,
    mode: Split,
    operand: Node,
    crossings: Crossings,
) -> Node:
    """From one split to another, or this rank's part of a whole value."""
    (source,) = Call(node).operands
    carried, result = placement.lines.carried(source), placement.lines.carried(node)
    assert isinstance(result, Carried)
    if mode.operands[0] is not Form.SPLIT:
        return crossings.take(node, operand)
    assert isinstance(carried, Carried)
    size = node.meta["val"].numel() * node.meta["val"].element_size()
    size //= placement.lines.lines[result.line].layout.world_size
    crossings.report(node, "exchange", size, "its tokens are split in another way")
    if needs_grad(node):
        crossings.report(node, "exchange", size, "completes a gradient", in_backward=True)
    line = placement.lines.lines[result.line]
    valid = crossings.valid(result) if line.has_padding(result.member) else None
    spreads = [_spread(placement, place) for place in (carried, result)]
    args = (operand, *spreads, valid, result.dim, crossings.group, describe_node(node))
    return graph.call_function(redistribute.move_tokens, args)


def _spread(placement: Placement, place: Carried) -> list[int]:
    layout, member = placement.lines.lines[place.line].layout, place.member
    spread = redistribute.Spread(
        kind=redistribute.KINDS.index(layout.kind), line=layout.length, ranks=layout.world_size,
        offset=member.offset, length=member.length, outer=place.outer, inner=place.inner,
    )  # fmt: skip
    return spread.numbers()


def _turn(
    graph: Graph,
    placement: Placement,
    node: Node,
    turn: Turn,
    operand: Node,
    crossings: Crossings,
) -> Node:
    source = Call(node).operands[0]
    carried = placement.lines.carried(source)
    assert isinstance(carried, Carried)
    _report_borders(placement, node, source, carried, turn.units, crossings)
    size = _token_bytes(source, carried) * turn.units
    crossings.report(node, "all_reduce", size, "tokens of the other end")
    crossings.report(node, "all_reduce", size, "completes a gradient", in_backward=True)
    own, length = crossings.own(carried), carried.member.length
    chunks = placement.lines.lines[carried.line].layout.chunks_per_rank
    where = (chunks, crossings.group, carried.dim, carried.inner, describe_node(node))
    args = (operand, turn.by, turn.units, own, length, *where)
    return graph.call_function(halo.roll_tokens, args)


def _look_up(
    graph: Graph,
    placement: Placement,
    node: Node,
    chosen: Lookup,
    operands: list[Node],
    crossings: Crossings,
) -> Node:
    """Tokens of a split value by number: their owners' rows, summed with zeros of the others."""
    call = Call(node)
    carried = placement.lines.carried(call.operands[0])
    assert isinstance(carried, Carried)
    own, length = crossings.own(carried), carried.member.length
    if chosen.by is None:
        where = (own, chosen.start, chosen.length, length, carried.dim)
        row = graph.call_function(token_lookup.take_range, (operands[0], *where))
        if len(call.result_shape) != len(call.shapes[0]):
            row = graph.call_function(aten.squeeze.dim, (row, carried.dim))
        return crossings.reduce(node, row)
    index = operands[chosen.by]
    rows = graph.call_function(
        token_lookup.local_rows, (index, own, length, carried.outer, carried.inner)
    )
    safe = graph.call_function(aten.clamp_min.default, (rows, 0))
    taken = _copy(graph, node, [safe if i == chosen.by else n for i, n in enumerate(operands)])
    trailing = _trailing(call, chosen.by, carried.dim)
    return crossings.reduce(
        node, graph.call_function(token_lookup.mask_rows, (taken, rows, trailing))
    )


def _trailing(call: Call, by: int, dim: int) -> int:
    """Dimensions of the result after those of the operand that holds the numbers."""
    result, numbers = call.result_shape, call.shapes[by]
    if call.node.target is aten.gather.default:
        return 0
    if call.node.target is aten.index_select.default:
        return len(result) - 1 - dim
    given = list(call["indices"])
    at = [d for d, i in enumerate(given) if i is not None]
    first = at[0] if at == list(range(at[0], at[-1] + 1)) else 0
    picked = max(len(given[d].meta["val"].shape) for d in at)
    assert len(numbers) <= picked
    return len(result) - first - picked


def _join(
    graph: Graph,
    placement: Placement,
    node: Node,
    mode: Split,
    operands: list[Node],
    crossings: Crossings,
) -> Node:
    """A concatenation along the line: every local token from the piece that it lies in."""
    carried = placement.lines.carried(node)
    assert isinstance(carried, Carried)
    is_local = [form is Form.SPLIT for form in mode.operands]
    args = (operands, list(mode.pieces), is_local, crossings.own(carried), carried.dim)
    return graph.call_function(token_lookup.join_pieces, args)


def _mean(
    graph: Graph, placement: Placement, node: Node, operand: Node, crossings: Crossings
) -> Node:
    """A mean over tokens: the sum over ranks, divided by the global count."""
    call = Call(node)
    shape, result = call.shapes[0], call.result_shape
    count = shape.numel() // max(result.numel(), 1)
    asked = call.get("dtype")
    dtype: dict[str, Any] = _wide(node) if asked is None else {"dtype": asked}
    if "dim" in call.arguments and call["dim"] is not None:
        args = (operand, call["dim"], call["keepdim"])
        total = graph.call_function(aten.sum.dim_IntList, args, dtype)
    else:
        total = graph.call_function(aten.sum.default, (operand,), dtype)
    mean = graph.call_function(aten.div.Scalar, (crossings.total(node, total), count))
    return crossings.narrowed(node, mean)


def _partial(graph: Graph, node: Node, operands: list[Node]) -> Node:
    """This rank's part of a sum: what sums alone is not rounded before all parts are there."""
    made = _copy(graph, node, operands)
    if node.target in (aten.sum.default, aten.sum.dim_IntList) and Call(node).get("dtype") is None:
        made.kwargs = {**made.kwargs, **_wide(node)}
    return made


def _wide(node: Node) -> dict[str, Any]:
    return {"dtype": torch.float32} if is_narrow(node) else {}
