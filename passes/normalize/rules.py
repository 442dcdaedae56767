"""Calls that touch tokens, written in operators that can be split.

A pad is a concatenation, and so are a slice written over and a cut into parts; a slice of a
concatenation is a concatenation of slices; a roll of two dimensions is two rolls, and so is a
Fourier transform; a convolution is one with its own padding on each side, and over patches it is a
linear layer. All are exact rewritings of the whole program. They are done only where tokens are
touched: other calls stay as the user wrote them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from ringfx.comm import halo
from ringfx.passes.axes import AxisMap
from ringfx.passes.axes.call import Call, result_values
from ringfx.passes.capture.simplify import eliminate_dead
from ringfx.passes.normalize import fourier
from ringfx.passes.normalize.graph_editor import GraphEditor, bounds, cat_dim
from ringfx.passes.normalize.masked_scatter import masked_scatter
from ringfx.passes.normalize.statistics import VARIANCES, group_norm, variance, vector_norm
from ringfx.passes.normalize.strided_slices import every_nth, of_streams
from ringfx.passes.normalize.strides import columns, pool, unfold, whole_blocks
from ringfx.passes.normalize.transposed import transposed_convolution
from ringfx.passes.token_axes.token_line import Lines, NotShardable, TokenDim

__all__ = ["normalize"]

aten = torch.ops.aten


def normalize(graph: Graph, axes: AxisMap, lines: Lines) -> bool:
    """Rewrite in place the calls that touch tokens and have a rule here; whether there was any."""
    editor = GraphEditor(graph, axes, lines)
    for node in list(graph.nodes):
        rule = RULES.get(node.target)
        new = rule(editor, node) if rule is not None else None
        if new is not None:
            node.replace_all_uses_with(new)
            editor.changed = True
    if editor.changed:
        eliminate_dead(graph)
        graph.lint()
    return editor.changed


def _slice(s: GraphEditor, node: Node) -> Node | None:
    call = Call(node)
    x = call.operands[0]
    dim = call.dim("dim", len(call.shapes[0]))
    if call["step"] != 1:
        return every_nth(s, node)
    start, end = bounds(call["start"], call["end"], int(call.shapes[0][dim]))
    is_cat = x.target is aten.cat.default and cat_dim(x) == dim
    if is_cat and s.along(x, dim) and len(x.args[0]) > 1:  # type: ignore[arg-type]
        return s.slice(node, x, dim, start, end)
    return of_streams(s, node, x, dim, start, end)


def _narrow(s: GraphEditor, node: Node) -> Node | None:
    """narrow: the slice that it is."""
    call = Call(node)
    x, start = call.operands[0], call["start"]
    dim = call.dim("dim", len(call.shapes[0]))
    if not (isinstance(start, int) and s.touches(x, dim)):
        return None
    start %= int(call.shapes[0][dim])
    return s.make(node, aten.slice.Tensor, x, dim, start, start + int(call.result_shape[dim]))


def _parts(s: GraphEditor, node: Node) -> Node | None:
    """split, chunk: each part a slice."""
    call = Call(node)
    x = call.operands[0]
    dim = call.dim("dim", len(call.shapes[0]))
    streams = s.touches(x, dim) and not s.along(x, dim)
    if not (streams or s.along(x, dim)) or len(call.result_shapes) < 2:
        return None
    starts = [0]
    for shape in call.result_shapes:
        starts.append(starts[-1] + int(shape[dim]))
    for user in list(node.users):
        if user.target is not operator.getitem:
            return None
        i = user.args[1]
        assert isinstance(i, int)
        part = of_streams(s, user, x, dim, starts[i], starts[i + 1])
        part = part or s.make(user, aten.slice.Tensor, x, dim, starts[i], starts[i + 1])
        if x.target is aten.cat.default and cat_dim(x) == dim and not streams:
            part = s.slice(user, x, dim, starts[i], starts[i + 1]) or part
        user.replace_all_uses_with(part)
        s.changed = True
    return None


def _roll(s: GraphEditor, node: Node) -> Node | None:
    """A roll of several dimensions is one of each, as the tokens are in one of them."""
    call = Call(node)
    x, rank = call.operands[0], len(call.shapes[0])
    dims = [d % rank for d in call["dims"]]
    if len(dims) < 2 or not any(s.touches(x, d) for d in dims):
        return None
    for dim, shift in zip(dims, call["shifts"], strict=True):
        x = s.make(node, aten.roll.default, x, [shift], [dim])
    return x


def _select(s: GraphEditor, node: Node) -> Node | None:
    """One token of blocks of them: first its block."""
    call = Call(node)
    x, shape = call.operands[0], [int(n) for n in call.shapes[0]]
    dim, place = call.dim("dim", len(shape)), s.token_dim(x)
    if not isinstance(place, TokenDim) or place.dim != dim or place.outer > 1 or place.inner == 1:
        return None
    block, index = divmod(int(call["index"]) % shape[dim], place.inner)
    sizes = [*shape[:dim], shape[dim] // place.inner, place.inner, *shape[dim + 1 :]]
    opened = s.make(node, aten.reshape.default, x, sizes)
    return s.make(
        node, aten.select.int, s.make(node, aten.select.int, opened, dim, block), dim, index
    )


def _pad(s: GraphEditor, node: Node) -> Node | None:
    """Constants in front and behind; what a convolution pads, the convolution pads itself."""
    call = Call(node)
    if call.get("mode", "constant") != "constant":
        return _pad_with_tokens(s, node)
    x, rank = call.operands[0], len(call.shapes[0])
    amounts = _amounts(call)
    padded = [d for d, pair in amounts.items() if pair != (0, 0)]
    along = [d for d in padded if s.along(x, d)]
    if not along or not x.meta["val"].is_floating_point():
        return None
    if all(u.target in CONVOLUTIONS for u in node.users) and min(padded) >= 2:
        return None
    dim, fill = along[0], call.get("value") or 0
    for other in padded:
        if other != dim:
            beside = [n for d in range(rank - 1, other - 1, -1)
                      for n in (amounts[d] if d == other else (0, 0))]  # fmt: skip
            x = s.make(node, aten.constant_pad_nd.default, x, beside, fill)
            s.tokens[x] = dim
    left, right = amounts[dim]
    size = int(x.meta["val"].shape[dim])
    middle = s.slice(node, x, dim, -left, size + min(right, 0))
    front = s.constant(node, x, dim, left, fill) if left > 0 else None
    back = s.constant(node, x, dim, right, fill) if right > 0 else None
    return s.cat(node, [front, middle, back], dim)


def _pad_with_tokens(s: GraphEditor, node: Node) -> Node | None:
    """Tokens of the ends in front and behind: of the other end, mirrored, or the last one."""
    call = Call(node)
    x, mode = call.operands[0], call["mode"]
    amounts = _pairs(call)
    along = [d for d, pair in amounts.items() if pair != (0, 0) and s.along(x, d)]
    if not along or min(min(pair) for pair in amounts.values()) < 0:
        return None
    if not x.meta["val"].is_floating_point():
        return None
    dim = along[0]
    left, right = amounts[dim]
    if any(pair != (0, 0) for d, pair in amounts.items() if d != dim):
        beside = [n for d, pair in amounts.items() for n in ((0, 0) if d == dim else pair)]
        x = s.make(node, aten.pad.default, x, beside, mode)
        s.tokens[x] = dim
    size = int(x.meta["val"].shape[dim])
    runs = {
        "circular": [(size - left, size), (0, right)],
        "replicate": [(0, 1), (size - 1, size)],
        "reflect": [(1, 1 + left), (size - 1 - right, size - 1)],
    }[mode]
    front, back = (s.make(node, aten.slice.Tensor, x, dim, *run) for run in runs)
    if mode == "reflect":
        front, back = (s.make(node, aten.flip.default, run, [dim]) for run in (front, back))
    times = (left, right) if mode == "replicate" else (min(left, 1), min(right, 1))
    return s.cat(node, [*[front] * times[0], x, *[back] * times[1]], dim)


def _amounts(call: Call) -> dict[int, tuple[int, int]]:
    """Dimension -> elements before and after; only constant padding."""
    return _pairs(call) if call.get("mode", "constant") == "constant" else {}


def _pairs(call: Call) -> dict[int, tuple[int, int]]:
    pairs = list(call["pad"])
    rank = len(call.shapes[0])
    return {rank - 1 - i: (pairs[2 * i], pairs[2 * i + 1]) for i in range(len(pairs) // 2)}


def _slice_scatter(s: GraphEditor, node: Node) -> Node | None:
    call = Call(node)
    x, new = call.operands
    dim = call.dim("dim", len(call.shapes[0]))
    if call["step"] != 1 or not s.along(x, dim):
        return None
    size = int(call.shapes[0][dim])
    start, end = bounds(call["start"], call["end"], size)
    pieces = [s.slice(node, x, dim, 0, start), new, s.slice(node, x, dim, end, size)]
    return s.cat(node, pieces, dim)


def _diff(s: GraphEditor, node: Node) -> Node | None:
    call = Call(node)
    x = call.operands[0]
    dim = call.dim("dim", len(call.shapes[0]))
    if call["n"] != 1 or not s.along(x, dim) or not x.meta["val"].is_floating_point():
        return None
    x = s.cat(node, [call["prepend"], x, call["append"]], dim)
    size = int(x.meta["val"].shape[dim])
    later, earlier = s.slice(node, x, dim, 1, size), s.slice(node, x, dim, 0, size - 1)
    return s.make(node, aten.sub.Tensor, later, earlier) if later and earlier else None


@dataclass(frozen=True, kw_only=True)
class _Convolution:
    x: Node
    weight: Node
    bias: Node | None
    stride: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int


def _read(node: Node) -> _Convolution | None:
    """The call's arguments in one form; a constant zero pad before it counted in."""
    call = Call(node)
    x, weight = call.operands[0], call.operands[1]
    kernel = call.shapes[1][2:]
    rank = len(kernel)
    if len(call.shapes[0]) != rank + 2:
        return None
    stride, dilation = _tuple(call["stride"], rank), _tuple(call["dilation"], rank)
    pads = _padding(call["padding"], kernel, dilation)
    if pads is None:
        return None
    if x.target in PADS and len(x.users) == 1:
        before = Call(x)
        amounts = _amounts(before)
        if (
            amounts
            and not before.get("value")
            and all(d >= 2 for d, p in amounts.items() if any(p))
        ):
            pads = tuple(
                (left + amounts.get(2 + i, (0, 0))[0], right + amounts.get(2 + i, (0, 0))[1])
                for i, (left, right) in enumerate(pads)
            )
            x = before.operands[0]
    bias = call["bias"]
    return _Convolution(
        x=x, weight=weight, bias=bias if isinstance(bias, Node) else None, stride=stride,
        pads=pads, dilation=dilation, groups=int(call["groups"]),
    )  # fmt: skip


def _tuple(value: Any, rank: int) -> tuple[int, ...]:
    values = [value] if isinstance(value, int) else list(value)
    return tuple(values * rank if len(values) == 1 else values)


def _padding(
    value: Any, kernel: Sequence[int], dilation: Sequence[int]
) -> tuple[tuple[int, int], ...] | None:
    if value == "valid":
        return ((0, 0),) * len(kernel)
    if value == "same":
        total = [d * (int(k) - 1) for d, k in zip(dilation, kernel, strict=True)]
        return tuple((t // 2, t - t // 2) for t in total)
    return tuple((p, p) for p in _tuple(value, len(kernel)))


def _convolution(s: GraphEditor, node: Node) -> Node | None:
    """A convolution over tokens, with the padding before and the cropping after it."""
    if Call(node).get("transposed"):
        return transposed_convolution(s, node)
    found = _read(node)
    if found is None:
        return None
    spatial = range(2, 2 + len(found.stride))
    patches = _patches(s, node, found)
    if patches is not None:
        return patches
    crop = _cropped(node)
    last = crop if crop is not None else node
    touched = [d for d in spatial if s.runs_along(found.x, d) or s.touches(last, d)]
    seen = any(
        int(found.weight.meta["val"].shape[d]) > 1 or found.stride[d - 2] > 1 for d in touched
    )
    if not touched or not seen:
        return None
    pads = list(found.pads)
    if crop is not None:
        dim = Call(crop).dim("dim", len(spatial) + 2)
        left, right = pads[dim - 2]
        removed = int(node.meta["val"].shape[dim]) - int(crop.meta["val"].shape[dim])
        pads[dim - 2] = (left, right - removed * found.stride[dim - 2])
    x, made = found.x, tuple(int(n) for n in node.meta["val"].shape)
    for d in touched if crop is None else ():
        spans = found.dilation[d - 2] * (int(found.weight.meta["val"].shape[d]) - 1) + 1
        blocks = whole_blocks(s, node, x, d, found.stride[d - 2], pads[d - 2], spans)
        if blocks is not None:
            x, pads[d - 2] = blocks
    new = s.make(
        node, halo.convolution, x, found.weight, *([found.bias] if found.bias else []),
        stride=found.stride, pads=tuple(pads), dilation=found.dilation, groups=found.groups,
    )  # fmt: skip
    for d in touched if crop is None else ():
        new = s.slice(node, new, d, 0, made[d]) or new
    if tuple(new.meta["val"].shape) != tuple(last.meta["val"].shape):
        return None
    if crop is not None:
        crop.replace_all_uses_with(new)
        s.changed = True
        return None
    return new


def _cropped(node: Node) -> Node | None:
    """The only user, if it keeps the first outputs along one dimension."""
    users = list(node.users)
    if len(users) != 1 or users[0].target is not aten.slice.Tensor:
        return None
    call = Call(users[0])
    dim = call.dim("dim", len(call.shapes[0]))
    first = (call["start"] or 0) == 0 and call["step"] == 1 and dim >= 2
    return users[0] if first and call.result_shape[dim] > 1 else None


def _patches(s: GraphEditor, node: Node, c: _Convolution) -> Node | None:
    """Patches side by side that become tokens row by row: a linear layer of each patch.

    The result of a convolution holds the rows and the columns of patches in two dimensions, which
    cannot be split together; the linear layer's tokens are one dimension.
    """
    weight, x = c.weight.meta["val"], c.x.meta["val"]
    kernel = [int(k) for k in weight.shape[2:]]
    plain = all(p == (0, 0) for p in c.pads) and set(c.dilation) == {1} and c.groups == 1
    if not isinstance(s.lines.token_dim(node), NotShardable):
        return None
    if not plain or list(c.stride) != kernel:
        return None
    counts = [int(n) for n in result_values(node)[0].shape[2:]]
    if any(int(n) != k * m for n, k, m in zip(x.shape[2:], kernel, counts, strict=True)):
        return None
    if len(kernel) < 2:
        return None
    batch, channels, rank = int(x.shape[0]), int(x.shape[1]), len(kernel)
    cut = [batch, channels, *(n for pair in zip(counts, kernel, strict=True) for n in pair)]
    order = [0, *(2 + 2 * i for i in range(rank)), 1, *(3 + 2 * i for i in range(rank))]
    tokens, inputs, outputs = _product(counts), channels * _product(kernel), int(weight.shape[0])
    opened = s.make(node, aten.reshape.default, c.x, cut)
    patches = s.make(node, aten.permute.default, opened, order)
    rows = s.make(node, aten.reshape.default, patches, [batch, tokens, inputs])
    flat = s.make(node, aten.reshape.default, c.weight, [outputs, inputs])
    made = s.make(node, aten.linear.default, rows, flat, *([c.bias] if c.bias else []))
    turned = s.make(node, aten.transpose.int, made, 1, 2)
    return s.make(node, aten.reshape.default, turned, [batch, outputs, *counts])


def _product(sizes: Sequence[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def _triangle(s: GraphEditor, node: Node) -> Node | None:
    """tril, triu: a choice by the numbers of row and column, of which each rank has its own."""
    call = Call(node)
    x, rank = call.operands[0], len(call.result_shape)
    row, column = rank - 2, rank - 1
    if not (s.along(node, row) or s.along(node, column)):
        return None
    ahead = _columns_ahead(s, node)
    compare = aten.le.Scalar if node.target is aten.tril.default else aten.ge.Scalar
    kept = s.make(node, compare, ahead, call["diagonal"])
    zero = s.make(node, aten.zeros_like.default, x)
    return s.make(node, aten.where.self, kept, x, zero)


def _identity(s: GraphEditor, node: Node) -> Node | None:
    """eye: 1 where the numbers of row and column are equal."""
    if not (s.along(node, 0) or s.along(node, 1)):
        return None
    found = s.make(node, aten.eq.Scalar, _columns_ahead(s, node), 0)
    return s.make(node, aten._to_copy.default, found, dtype=node.meta["val"].dtype)


def _columns_ahead(s: GraphEditor, node: Node) -> Node:
    """By how much each column's number is larger than each row's: [rows, columns]."""
    value: torch.Tensor = node.meta["val"]
    rows, columns = (
        s.make(node, aten.arange.default, int(n), device=value.device) for n in value.shape[-2:]
    )
    return s.make(node, aten.sub.Tensor, columns, s.make(node, aten.unsqueeze.default, rows, 1))


def _reshaped_twice(s: GraphEditor, node: Node) -> Node | None:
    """A reshape of a reshape is one of what was reshaped first, where tokens stood in two dims."""
    base = node.args[0]
    if not isinstance(base, Node) or base.target is not aten.reshape.default:
        return None
    if base in s.axes.values and not isinstance(s.lines.token_dim(base), NotShardable):
        return None
    source = base.args[0]
    assert isinstance(source, Node)
    shape = [int(n) for n in node.meta["val"].shape]
    if shape == [int(n) for n in source.meta["val"].shape]:
        return source
    return s.make(node, aten.reshape.default, source, shape)


PADS = frozenset({aten.pad.default, aten.constant_pad_nd.default})
CONVOLUTIONS = frozenset(
    {
        aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default,
        aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding,
    }
)  # fmt: skip
POOLS = (
    aten.avg_pool2d.default, aten.avg_pool3d.default, aten.max_pool2d_with_indices.default,
    aten.max_pool3d_with_indices.default,
)  # fmt: skip
RESHAPES = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
    aten.unflatten.int,
)  # fmt: skip
PARTS = (
    aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default,
    aten.tensor_split.sections,
)  # fmt: skip

RULES: Mapping[object, Callable[[GraphEditor, Node], Node | None]] = {
    aten.slice.Tensor: _slice,
    aten.narrow.default: _narrow,
    aten.roll.default: _roll,
    aten.select.int: _select,
    aten.slice_scatter.default: _slice_scatter,
    aten.im2col.default: columns,
    aten.diff.default: _diff,
    aten.masked_scatter.default: masked_scatter,
    aten.unfold.default: unfold,
    aten.linalg_vector_norm.default: vector_norm,
    aten.group_norm.default: group_norm,
    **fourier.RULES,
    **dict.fromkeys((aten.tril.default, aten.triu.default), _triangle),
    **dict.fromkeys((aten.eye.default, aten.eye.m), _identity),
    **dict.fromkeys(VARIANCES, variance),
    **dict.fromkeys(POOLS, pool),
    **dict.fromkeys(PARTS, _parts),
    **dict.fromkeys(PADS, _pad),
    **dict.fromkeys(CONVOLUTIONS, _convolution),
    **dict.fromkeys(RESHAPES, _reshaped_twice),
}
