"""Windows of tokens that start at every nth: pools, strided convolutions, ``unfold``.

Windows side by side are a reshape. Others are convolutions: a mean over each, or one that chooses
each of its places. A convolution whose stride does not divide the tokens is one over whole blocks
of them, zeros behind the last, of which the first results are taken.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from ringfx.comm import halo
from ringfx.passes.axes.call import Call
from ringfx.passes.normalize.graph_editor import GraphEditor, cat_dim

__all__ = ["pool", "unfold", "whole_blocks"]

aten = torch.ops.aten


def whole_blocks(
    s: GraphEditor, node: Node, x: Node, dim: int, stride: int, pads: tuple[int, int], seen: int
) -> tuple[Node, tuple[int, int]] | None:
    """What to convolve instead along ``dim``, and its padding, so that the stride divides it.

    ``seen``: elements that a kernel spans. None where it divides already.
    """
    length = int(x.meta["val"].shape[dim])
    made = (length + sum(pads) - seen) // stride + 1
    if stride == 1 or length == stride * made or not s.along(x, dim):
        return None
    blocks = max(-(-length // stride), made)
    missing = stride * blocks - length
    zeros = s.constant(node, x, dim, missing, 0.0) if missing else None
    return s.cat(node, [x, zeros], dim), (pads[0], seen - stride - pads[0])


def pool(s: GraphEditor, node: Node) -> Node | None:
    """Means and maxima of windows."""
    call = Call(node)
    x, shape = call.operands[0], [int(n) for n in call.shapes[0]]
    rank = 3 if "3d" in call.name else 2
    kernel, stride = call["kernel_size"], call["stride"] or call["kernel_size"]
    kernel, stride, pads, dilation = (
        _tuple(given, rank) for given in (kernel, stride, call["padding"], call.get("dilation", 1))
    )
    dims = range(len(shape) - rank, len(shape))
    touched = any(s.touches(x, d) or s.touches(node, d) for d in dims)
    if not touched or set(dilation) != {1} or call["ceil_mode"]:
        return None
    is_max = len(call.result_shapes) > 1
    if stride == kernel and not any(pads):
        return _side_by_side(s, node, x, dims, kernel, is_max)
    counts_padding = call.get("count_include_pad", True) or not any(pads)
    if is_max or len(shape) != rank + 2 or not counts_padding or call.get("divisor_override"):
        return None
    channels, size = shape[1], math.prod(kernel)
    weight = s.make(node, aten.new_full.default, x, [channels, 1, *kernel], 1.0 / size)
    return convolved(s, node, x, weight, stride, [(n, n) for n in pads])


def convolved(
    s: GraphEditor,
    node: Node,
    x: Node,
    weight: Node,
    stride: Sequence[int],
    pads: Sequence[tuple[int, int]],
) -> Node:
    """A depthwise convolution, over whole blocks along the tokens."""
    pads, shape = list(pads), [int(n) for n in x.meta["val"].shape]
    kernel = [int(n) for n in weight.meta["val"].shape[2:]]
    crops = {}
    for i, (step, seen) in enumerate(zip(stride, kernel, strict=True)):
        found = whole_blocks(s, node, x, 2 + i, step, pads[i], seen)
        if found is not None:
            crops[2 + i] = (shape[2 + i] + sum(pads[i]) - seen) // step + 1
            x, pads[i] = found
    y = s.make(
        node, halo.convolution, x, weight, stride=tuple(stride), pads=tuple(pads),
        dilation=(1,) * len(kernel), groups=shape[1],
    )  # fmt: skip
    for dim, made in crops.items():
        y = _cut(s, node, y, dim, made)
    return y


def _side_by_side(
    s: GraphEditor, node: Node, x: Node, dims: Sequence[int], kernel: Sequence[int], is_max: bool
) -> Node | None:
    """Each window its own block of elements."""
    sizes: list[int] = [int(n) for n in x.meta["val"].shape[: dims[0]]]
    windows: list[int] = []
    for dim, seen in zip(dims, kernel, strict=True):
        made = int(x.meta["val"].shape[dim]) // seen
        x = _cut(s, node, x, dim, made * seen)
        sizes += [made, seen]
        windows.append(len(sizes) - 1)
    opened = s.make(node, aten.reshape.default, x, sizes)
    if not is_max:
        return s.make(node, aten.mean.dim, opened, windows)
    if any(user.target is not operator.getitem or user.args[1] != 0 for user in node.users):
        return None
    order = [d for d in range(len(sizes)) if d not in windows] + windows
    turned = s.make(node, aten.permute.default, opened, order)
    kept = [sizes[d] for d in order[: -len(windows)]]
    flat = s.make(node, aten.reshape.default, turned, [*kept, math.prod(kernel)])
    _replace_first(s, node, s.make(node, aten.max.dim, flat, -1))
    return None


def _replace_first(s: GraphEditor, node: Node, new: Node) -> None:
    """What reads the first of several results reads that of another call."""
    for user in list(node.users):
        user.replace_input_with(node, new)
        s.changed = True


def unfold(s: GraphEditor, node: Node) -> Node | None:
    """``x.unfold(dim, size, step)``: windows, whose elements are the last dimension."""
    call = Call(node)
    x, shape = call.operands[0], [int(n) for n in call.shapes[0]]
    dim, size, step = call.dim("dimension", len(shape)), int(call["size"]), int(call["step"])
    if not s.touches(x, dim) or not x.meta["val"].is_floating_point():
        return None
    made = (shape[dim] - size) // step + 1
    if size == step:
        x = _cut(s, node, x, dim, made * size)
        opened = s.make(
            node, aten.reshape.default, x, [*shape[:dim], made, size, *shape[dim + 1 :]]
        )
        return s.make(node, aten.movedim.int, opened, dim + 1, -1)
    x, pads = _unpadded(s, x, dim)
    if not s.along(x, dim):
        return None
    shape[dim] = int(x.meta["val"].shape[dim])
    last = s.make(node, aten.movedim.int, x, dim, -1)
    others = [n for d, n in enumerate(shape) if d != dim]
    rows = s.make(node, aten.reshape.default, last, [1, math.prod(others), shape[dim]])
    given = x.meta["val"]
    one = s.make(node, aten.eye.default, size, dtype=given.dtype, device=given.device)
    each = s.make(node, aten.unsqueeze.default, one, 1)
    weight = s.make(node, aten.repeat.default, each, [math.prod(others), 1, 1])
    s.tokens[rows] = 2
    y = convolved(s, node, rows, weight, [step], [pads])
    opened = s.make(node, aten.reshape.default, y, [*others, size, made])
    windows = s.make(node, aten.movedim.int, opened, -1, dim)
    return windows


def _unpadded(s: GraphEditor, x: Node, dim: int) -> tuple[Node, tuple[int, int]]:
    """What zeros were put around, and how many before and behind it."""
    if x.target is not aten.cat.default or cat_dim(x) != dim:
        return x, (0, 0)
    pieces = Call(x).operands
    zeros = [n.target is aten.new_full.default and not n.args[2] for n in pieces]
    if zeros.count(False) != 1:
        return x, (0, 0)
    sizes, at = [int(n.meta["val"].shape[dim]) for n in pieces], zeros.index(False)
    return pieces[at], (sum(sizes[:at]), sum(sizes[at + 1 :]))


def _cut(s: GraphEditor, node: Node, x: Node, dim: int, size: int) -> Node:
    found = s.slice(node, x, dim, 0, size)
    assert found is not None, "a window has an element"
    return found


def _tuple(value: Any, rank: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values
