"""Masks and biases made of pairs of tokens, a row for each query: columns get an axis of their own.

``(x @ x.T) > 0`` has the same token axis twice, as rows and as columns, and what does cannot be
split. But attention reads it row by row: a rank needs the rows of its own queries, made of its own
tokens' and all tokens' x. So wherever rows and columns meet, what gives the columns becomes a value
of every token (``ringfx.ir.markers.every_token``), whose tokens are another axis from there on:

    x @ x.T > 0    ->    x @ every_token(x.T) > 0          [S / p, S] on each rank
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from ringfx.ir import tiles
from ringfx.ir.attention_spec import AttentionSpec
from ringfx.ir.markers import every_token
from ringfx.ops import attention
from ringfx.passes.axes.call import given_input
from ringfx.passes.axes.how import Reshape
from ringfx.passes.axes.propagate import NamedOp
from ringfx.passes.token_axes.token_line import Lines, NotShardable

__all__ = ["separate_columns"]


@dataclass(frozen=True)
class _Meeting:
    """Where a call is given columns beside rows: its operand, and the dimensions that they are."""

    call: Node
    operand: int
    dims: tuple[int, ...]


def separate_columns(graph: Graph, lines: Lines) -> bool:
    """Give columns an axis of their own in every matrix that needs it; whether any did."""
    met = dict.fromkeys(
        m for value, row in _matrices(graph, lines) for m in _meetings(lines, value, row)
    )
    made: dict[tuple[Node, tuple[int, ...]], Node] = {}
    for meeting in met:
        _part(graph, lines, meeting, made)
    return bool(met)


def _matrices(graph: Graph, lines: Lines) -> Iterator[tuple[Node, int]]:
    """Computed matrices that attention reads at its queries' rows, and the dim of their rows."""
    for call in graph.find_nodes(op="call_function", target=attention):
        spec = AttentionSpec.from_json(str(call.kwargs["spec"]))
        read: Any = call.args[3]
        for i, dim in tiles.matrix_rows(spec.keep, spec.bias).items():
            value = read[i]
            is_pairs = isinstance(lines.token_dim(value), NotShardable)
            length = value.meta["val"].shape[dim]
            if is_pairs and given_input(value) is None and length == spec.q_len:
                yield value, dim


def _meetings(lines: Lines, value: Node, row: int) -> list[_Meeting]:
    """Where the columns of a matrix come from; nothing where rows cannot be told from columns."""
    found: list[_Meeting] = []
    stack, seen = [(value, row)], set[tuple[Node, int]]()
    while stack:
        node, row = stack.pop()
        if (node, row) in seen:
            continue
        seen.add((node, row))
        named = lines.axes.ops.get(node)
        parts = None if named is None else _operands(lines, named, row)
        if parts is None:
            return []
        for i, rows, columns in parts:
            operand = named.call.operands[i]  # type: ignore[union-attr]
            if columns and rows:
                stack.append((operand, rows[0]))
            elif columns and operand.target is every_token:
                return []  # parted already, and they met again elsewhere
            elif columns:
                found.append(_Meeting(node, i, columns))
    return found


_Part = tuple[int, tuple[int, ...], tuple[int, ...]]


def _operands(lines: Lines, named: NamedOp, row: int) -> list[_Part] | None:
    """For each operand with tokens which of its dims are rows, and which are not."""
    axes, operands = named.axes, named.call.operands
    if isinstance(axes.how, Reshape):
        kept = _kept_dim(named, row)
        return None if kept is None else [_roles(lines, 0, operands[0], (kept,))]
    label = axes.results[0][row]
    others = [name for d, names in enumerate(axes.results[0]) if d != row for name in names]
    if named.clash or len(label) != 1 or label[0] in others or len(axes.results) != 1:
        return None
    parts: list[_Part] = []
    for i, (operand, labels) in enumerate(zip(operands, axes.operands, strict=True)):
        rows = [d for d, names in enumerate(labels or ()) if label[0] in names]
        if len(rows) > 1 or any(labels and len(labels[d]) != 1 for d in rows):
            return None
        parts.append(_roles(lines, i, operand, tuple(rows)))
    return parts


def _roles(lines: Lines, i: int, operand: Node, rows: tuple[int, ...]) -> _Part:
    tokens = lines.dims_with_tokens(operand)
    return i, tuple(d for d in rows if d in tokens), tuple(d for d in tokens if d not in rows)


def _kept_dim(named: NamedOp, row: int) -> int | None:
    """The dim of what is reshaped that is a dim of the result, elements in the same order."""
    result, source = named.call.result_shape, named.call.shapes[0]
    behind = result[row + 1 :].numel()
    for d, size in enumerate(source):
        if size == result[row] and source[d + 1 :].numel() == behind:
            return d
    return None


def _part(
    graph: Graph, lines: Lines, meeting: _Meeting, made: dict[tuple[Node, tuple[int, ...]], Node]
) -> None:
    named = lines.axes.ops[meeting.call]
    value = named.call.operands[meeting.operand]
    key = (value, meeting.dims)
    if key not in made:
        inputs = graph.find_nodes(op="placeholder")
        with graph.inserting_after(inputs[-1] if value.op == "placeholder" else value):
            made[key] = graph.call_function(every_token, (value, list(meeting.dims)))
        made[key].meta = dict(value.meta)
    _replace_operand(meeting.call, meeting.operand, made[key])


def _replace_operand(call: Node, number: int, new: Node) -> None:
    """Put another value in the place of one tensor operand, by its number among them."""
    numbers = itertools.count()

    def replaced(n: Node) -> Node:
        is_tensor = isinstance(n.meta.get("val"), torch.Tensor)
        return new if is_tensor and next(numbers) == number else n

    args, kwargs = torch.fx.node.map_arg((call.args, call.kwargs), replaced)
    call.args, call.kwargs = args, kwargs
