"""Scores, masks and biases made of pairs of tokens: columns get an axis of their own.

``w = f(q @ k.T)`` has the same token axis twice, as rows and as columns, and what does cannot be
split. But as long as f reads whole rows and no two of them, a rank needs the rows of its own
queries alone: made of its own q and of all ranks' k. So wherever rows and columns meet, what gives
the columns becomes a value of every token (``ringfx.ir.markers.every_token``), whose tokens are
another axis from there on:

    f(q @ k.T) @ v    ->    f(q @ every_token(k.T)) @ every_token(v)    [S / p, S] on each rank

The same holds for what a map of rows is made of besides (masks, distances of positions, a bias that
attention reads row by row). What has columns alone in the end (a sum over the rows) gets an axis of
its own once more, as others may read it as tokens. Calls that do read several rows say so by their
own rules: a softmax over the rows is one along the tokens, a transpose is gathered.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch.fx import Graph, Node

from ringfx.ir.markers import every_token
from ringfx.passes.axes.call import AxisSharing, Call, Labels, given_input, result_values
from ringfx.passes.axes.how import Attend, Reshape
from ringfx.passes.axes.propagate import NamedOp
from ringfx.passes.token_axes.token_line import Lines

__all__ = ["separate_columns"]

Value: TypeAlias = tuple[Node, int]
"""One tensor of what a call gives."""
Dims: TypeAlias = tuple[int, ...]

CONTRACTED, ATTENDED, GATHERED = 4, 8, 8
"""What counts for or against reading a dimension as rows, next to one that a call needs all of."""


def separate_columns(graph: Graph, lines: Lines) -> bool:
    """Give columns an axis of their own wherever they meet rows; whether any were given one."""
    cuts: dict[_Cut, None] = {}
    seen: set[Value] = set()
    for node in lines.axes.ops:
        for i in range(len(result_values(node))):
            if (node, i) not in seen:
                best = max(_readings(lines, (node, i)), key=lambda x: x.worth, default=None)
                seen |= set(best.rows) if best else set()
                cuts |= dict.fromkeys(best.cuts if best else ())
    made: dict[tuple[Node, Dims], Node] = {}
    for cut in cuts:
        cut.insert(graph, lines, made)
    return bool(cuts)


@dataclass(frozen=True)
class _Cut:
    """Columns of one operand of a call, or (None) of its result."""

    value: Node
    operand: int | None
    dims: Dims
    call: Node

    def insert(self, graph: Graph, lines: Lines, made: dict[tuple[Node, Dims], Node]) -> None:
        new = _every(graph, lines, self.value, self.dims, made)
        if self.operand is None:
            self.value.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        else:
            _replace_operand(self.call, self.operand, new)


def _every(
    graph: Graph, lines: Lines, value: Node, dims: Dims, made: dict[tuple[Node, Dims], Node]
) -> Node:
    """A value of every token; a part of some tokens is a part of a value of every one of them."""
    key = (value, dims)
    if key not in made:
        inputs = graph.find_nodes(op="placeholder")
        last = inputs[-1] if value.op == "placeholder" else value
        is_part = value.target is torch.ops.aten.slice.Tensor and Call(value)["step"] == 1
        source = value.args[0] if is_part else None
        if isinstance(source, Node) and lines.dims_with_tokens(source) == dims:
            of = _every(graph, lines, source, dims, made)
            with graph.inserting_after(last):
                made[key] = graph.call_function(value.target, (of, *value.args[1:]))  # type: ignore[arg-type]
        else:
            with graph.inserting_after(last):
                made[key] = graph.call_function(every_token, (value, list(dims)))
        made[key].meta = dict(value.meta)
    return made[key]


@dataclass(frozen=True, eq=False, kw_only=True)
class _Reading:
    """Values that hold pairs of tokens, connected by calls, with the dimension of each's rows."""

    rows: Mapping[Value, int]
    cuts: tuple[_Cut, ...]
    worth: int
    """How well it fits what the calls do: most of them keep rows and use up columns."""


def _readings(lines: Lines, value: Value) -> Iterator[_Reading]:
    """Each way to tell rows from columns in values that hold pairs, from this one on."""
    if given_input(value[0]) is not None:
        return
    for dim in _tokens(lines, value):
        if _is_pairs(lines, value, dim):
            rows = _followed(lines, value, dim)
            calls = dict.fromkeys(c for v in rows for c in _calls(lines, v))
            cuts = tuple(cut for c in calls for cut in _cuts(lines, lines.axes.ops[c], rows))
            worth = sum(_worth(lines, lines.axes.ops[c], rows) for c in calls)
            whole = sum(_value(cut.value) in rows for cut in cuts if cut.operand is not None)
            if _has_few(lines, rows) and not any(_orders(lines.axes.ops[c], rows) for c in calls):
                continue
            yield _Reading(rows=rows, cuts=cuts, worth=worth - GATHERED * whole)


def _tokens(lines: Lines, value: Value) -> Dims:
    return lines.dims_with_tokens(*value)


def _is_pairs(lines: Lines, value: Value, row: int) -> bool:
    """Whether a value has rows of tokens that can be split, and columns beside them."""
    dims, tokens = lines.axes.dims(*value), _tokens(lines, value)
    if row not in tokens or len(tokens) < 2:
        return False
    place = lines.in_dim(dims[row], row)
    return place is not None and place.outer == 1


def _has_few(lines: Lines, rows: Mapping[Value, int]) -> bool:
    """Whether few tokens of one line meet many of another: the few are gathered, if the many may
    stay sharded (``ringfx.passes.normalize.reshard_points``)."""
    for value in rows:
        dims, tokens = lines.axes.dims(*value), _tokens(lines, value)
        found = [place for d in tokens if (place := lines.in_dim(dims[d], d)) is not None]
        lengths = [place.member.length for place in found]
        if len({place.line for place in found}) > 1 and max(lengths) >= 2 * min(lengths):
            return True
    return False


def _orders(named: NamedOp, rows: Mapping[Value, int]) -> bool:
    """Whether a call needs all of a row at once: it sorts it, or looks elements of it up."""
    for operand, labels in zip(named.call.operands, named.axes.operands, strict=True):
        row = rows.get(_value(operand))
        names = {x for d, dim in enumerate(labels or ()) if d != row for x in dim}
        needs = any(named.axes.share_of(x) is AxisSharing.NEEDS_ALL for x in names)
        if row is not None and needs and named.axes.how is None:
            return True
    return False


def _followed(lines: Lines, start: Value, row: int) -> dict[Value, int]:
    """The values with the same rows, forwards and backwards; not those that are given."""
    rows, stack = {start: row}, [start]
    while stack:
        value = stack.pop()
        for call in _calls(lines, value):
            named = lines.axes.ops[call]
            for other, dim in _with_row(named, _row_label(named, {value: rows[value]})):
                known = other in rows or given_input(other[0]) is not None
                if not known and _is_pairs(lines, other, dim):
                    rows[other] = dim
                    stack.append(other)
    return rows


def _calls(lines: Lines, value: Value) -> Iterator[Node]:
    """The call that makes a value, and those that read it."""
    node, i = value
    if node in lines.axes.ops:
        yield node
    for user in node.users:
        if user.target is operator.getitem:
            yield from (u for u in user.users if user.args[1] == i and u in lines.axes.ops)
        elif user in lines.axes.ops:
            yield user


def _value(node: Node) -> Value:
    if node.target is operator.getitem:
        source, i = node.args
        assert isinstance(source, Node)
        assert isinstance(i, int)
        return source, i
    return node, 0


_Label: TypeAlias = str | tuple[int, int]
"""A label of a rule; of a reshape the dimension before and after it."""


def _row_label(named: NamedOp, rows: Mapping[Value, int]) -> _Label | None:
    """What the call's rule calls the rows; those of its result, if that has pairs too."""
    if named.clash:
        return None
    node, axes = named.call.node, named.axes
    if isinstance(axes.how, Reshape):
        source, result = _value(named.call.operands[0]), (node, 0)
        if result in rows:
            before = _same_place(named.call.result_shape, named.call.shapes[0], rows[result])
            return None if before is None else (before, rows[result])
        after = _same_place(named.call.shapes[0], named.call.result_shape, rows[source])
        return None if after is None else (rows[source], after)
    results = [(x, labels) for i, labels in enumerate(axes.results) if (x := (node, i)) in rows]
    operands = [
        (x, labels)
        for n, labels in zip(named.call.operands, axes.operands, strict=True)
        if (x := _value(n)) in rows and labels is not None
    ]
    for value, labels in (*results, *operands):
        names = labels[rows[value]]
        if len(names) == 1:
            return names[0]
    return None


def _same_place(shape: torch.Size, other: torch.Size, dim: int) -> int | None:
    """The dim of the other shape that is this one: as long, with as many elements behind it."""
    behind = shape[dim + 1 :].numel()
    for d, size in enumerate(other):
        if size == shape[dim] and other[d + 1 :].numel() == behind:
            return d
    return None


def _with_row(named: NamedOp, label: _Label | None) -> Iterator[tuple[Value, int]]:
    """Every operand and result that has the rows, and in which dimension."""
    node, axes = named.call.node, named.axes
    if label is None:
        return
    for n, labels in zip(named.call.operands, axes.operands, strict=True):
        for dim in _dims_of(label, labels, 0):
            yield _value(n), dim
    for i, labels in enumerate(axes.results):
        for dim in _dims_of(label, labels, 1):
            yield (node, i), dim


def _dims_of(label: _Label, labels: Labels | None, side: int) -> Dims:
    """Where operands (side 0) or results (side 1) with these labels have the rows."""
    if isinstance(label, tuple):
        return () if labels is None else (label[side],)
    return tuple(d for d, names in enumerate(labels or ()) if names == (label,))


def _cuts(lines: Lines, named: NamedOp, rows: Mapping[Value, int]) -> Iterator[_Cut]:
    """Where columns enter a call on pairs, and where they leave it without rows."""
    node, axes, label = named.call.node, named.axes, _row_label(named, rows)
    if label is None:
        return
    read = axes.how.captured if isinstance(axes.how, Attend) else range(len(axes.operands))
    for i, (operand, labels) in enumerate(zip(named.call.operands, axes.operands, strict=True)):
        if labels is None or i not in read or operand.target is every_token:
            continue
        value, here = _value(operand), set(_dims_of(label, labels, 0))
        if value in rows and here == {rows[value]}:
            continue
        kept = set() if value in rows else here
        dims = tuple(d for d in _tokens(lines, value) if d not in kept)
        if dims and len(kept) <= 1:
            yield _Cut(operand, i, dims, node)
    if isinstance(axes.how, Attend):
        return  # keys are used up, but what attention gives has rows: those of its queries
    for i, labels in enumerate(axes.results):
        value, here = (node, i), set(_dims_of(label, labels, 1))
        dims = tuple(d for d in _tokens(lines, value) if d not in here)
        if value not in rows and dims and node.target is not every_token:
            for found in _nodes_of(value):
                if any(user.target is not every_token for user in found.users):
                    yield _Cut(found, None, dims, node)


def _nodes_of(value: Value) -> list[Node]:
    node, i = value
    if len(result_values(node)) == 1 and isinstance(node.meta["val"], torch.Tensor):
        return [node]
    return [u for u in node.users if u.target is operator.getitem and u.args[1] == i]


def _worth(lines: Lines, named: NamedOp, rows: Mapping[Value, int]) -> int:
    """Whether a call keeps what are taken for rows, and uses up columns."""
    worth, axes = 0, named.axes
    is_product = len(named.call.operands) > 1
    for operand, labels in zip(named.call.operands, axes.operands, strict=True):
        value = _value(operand)
        if value not in rows or labels is None:
            continue
        for dim in _tokens(lines, value):
            sign = -1 if dim == rows[value] else 1
            for share in (axes.share_of(name) for name in labels[dim]):
                if share is AxisSharing.NEEDS_ALL:
                    worth += sign * (ATTENDED if isinstance(axes.how, Attend) else 1)
                elif share is AxisSharing.PARTIAL_SUM and is_product:
                    worth += sign * CONTRACTED
    return worth


def _replace_operand(call: Node, number: int, new: Node) -> None:
    """Put another value in the place of one tensor operand, by its number among them."""
    numbers = itertools.count()

    def replaced(n: Node) -> Node:
        is_tensor = isinstance(n.meta.get("val"), torch.Tensor)
        return new if is_tensor and next(numbers) == number else n

    args, kwargs = torch.fx.node.map_arg((call.args, call.kwargs), replaced)
    call.args, call.kwargs = args, kwargs
