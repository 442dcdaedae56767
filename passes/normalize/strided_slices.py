"""Slices that take whole blocks of a dimension: a reshape into blocks, and a choice among them.

``x[1::2]`` is one of two columns of pairs, and of three streams of the same tokens, one after the
other in a dimension, the last two are two rows of three. Said so, a split of the tokens is a split
of what is taken.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from ringfx.passes.axes.call import Call
from ringfx.passes.normalize.graph_editor import GraphEditor, bounds
from ringfx.passes.token_axes.token_line import NotShardable, TokenDim

__all__ = ["every_nth", "of_streams"]

aten = torch.ops.aten


def every_nth(s: GraphEditor, node: Node) -> Node | None:
    """``x[r::n]`` of a dimension that n divides."""
    call = Call(node)
    x, step = call.operands[0], call["step"]
    dim = call.dim("dim", len(call.shapes[0]))
    size, taken = int(call.shapes[0][dim]), int(call.result_shape[dim])
    first, _ = bounds(call["start"], call["end"], size)
    if step == 1 or size % step or taken * step != size or first >= step:
        return None
    if not any(_meets_tokens(s, value, dim) for value in (x, node)):
        return None
    opened = s.make(node, aten.reshape.default, x, _cut(call.shapes[0], dim, (taken, step)))
    return s.make(node, aten.select.int, opened, dim + 1, first)


def _meets_tokens(s: GraphEditor, value: Node, dim: int) -> bool:
    return s.touches(value, dim) or isinstance(s.token_dim(value), NotShardable)


def of_streams(
    s: GraphEditor, before: Node, x: Node, dim: int, start: int, end: int
) -> Node | None:
    """``x[start:end]`` where both are ends of streams of the same tokens."""
    place = s.token_dim(x)
    if not isinstance(place, TokenDim) or place.dim != dim or place.member.is_sorted:
        return None
    shape = [int(n) for n in x.meta["val"].shape]
    stream = shape[dim] // place.outer
    if place.outer == 1 or start % stream or end % stream or start >= end:
        return None
    count = (end - start) // stream
    opened = s.make(before, aten.reshape.default, x, _cut(shape, dim, (place.outer, stream)))
    if count == 1:
        return s.make(before, aten.select.int, opened, dim, start // stream)
    rows = s.make(before, aten.slice.Tensor, opened, dim, start // stream, end // stream)
    return s.make(before, aten.reshape.default, rows, _cut(shape, dim, (count * stream,)))


def _cut(shape: Sequence[int], dim: int, sizes: Sequence[int]) -> list[int]:
    """The shape with other dimensions in place of one."""
    return [*map(int, shape[:dim]), *sizes, *map(int, shape[dim + 1 :])]
