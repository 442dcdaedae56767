"""Windows of tokens that start at every nth: pools, strided convolutions, ``unfold``.

Windows side by side are a reshape. Others stay pools, with what they reach of neighbouring tokens
(``ringfx.comm.halo_pools``): as convolutions they would round to TF32, and make infinities NaN. One
whose stride does not divide the tokens runs over whole blocks of them, with what counts for nothing
behind the last, and the first results are taken.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ringfx.comm import halo_pools
from ringfx.passes.axes.call import Call, result_values
from ringfx.passes.normalize.graph_editor import GraphEditor, cat_dim

__all__ = ["columns", "pool", "unfold", "whole_blocks"]

aten = torch.ops.aten


def whole_blocks(
    s: GraphEditor,
    node: Node,
    x: Node,
    dim: int,
    stride: int,
    pads: tuple[int, int],
    seen: int,
    fill: float = 0.0,
) -> tuple[Node, tuple[int, int]] | None:
    """What to convolve instead along ``dim``, and its padding, so that the stride divides it.

    ``seen``: elements that a kernel spans; ``fill`` stands behind the last. None where it divides
    already.
    """
    length = int(x.meta["val"].shape[dim])
    made = (length + sum(pads) - seen) // stride + 1
    if stride == 1 or length == stride * made or not s.along(x, dim):
        return None
    blocks = max(-(-length // stride), made)
    missing = stride * blocks - length
    behind = s.constant(node, x, dim, missing, fill) if missing else None
    return s.cat(node, [x, behind], dim), (pads[0], seen - stride - pads[0])


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
    if not touched:
        return None
    is_max, is_plain = len(call.result_shapes) > 1, set(dilation) == {1} and not call["ceil_mode"]
    if is_plain and stride == kernel and not any(pads):
        return _side_by_side(s, node, x, dims, kernel, is_max)
    is_mean = not is_max and is_plain and not call.get("divisor_override")
    if not x.meta["val"].is_floating_point() or not (is_max or is_mean):
        return None
    if is_max and not _only_first_is_read(node):
        return None
    windows = _Windows(kernel=kernel, stride=stride, lefts=pads, dilation=dilation)
    made = [int(n) for n in result_values(node)[0].shape]
    found = _overlapping(s, node, x, windows, "max" if is_max else "mean", made)
    if not is_max:
        counts_padding = call["count_include_pad"] or not any(pads)
        return found if counts_padding else _of_those_inside(s, node, found, windows, made)
    for first in list(node.users):
        first.replace_all_uses_with(found)
        s.changed = True
    return None


def _of_those_inside(
    s: GraphEditor, node: Node, mean: Node, windows: _Windows, made: Sequence[int]
) -> Node:
    """A mean that counts zeros around its windows, as one that does not: over the share inside."""
    x, rank = Call(node).operands[0], len(windows.kernel)
    space = [int(n) for n in x.meta["val"].shape[-rank:]]
    ones = s.make(node, aten.new_full.default, x, [1, 1, *space], 1.0)
    ones.meta["ringfx_needs_grad"] = False
    for d in range(rank):
        s.tokens |= {ones: 2 + d} if s.along(x, len(x.meta["val"].shape) - rank + d) else {}
    share = _overlapping(s, node, ones, windows, "mean", [1, 1, *made[-rank:]])
    if len(made) == rank + 1:
        share = s.make(node, aten.squeeze.dim, share, 0)
    return s.make(node, aten.div.Tensor, mean, share)


@dataclass(frozen=True, kw_only=True)
class _Windows:
    """Of each of the last dimensions."""

    kernel: Sequence[int]
    stride: Sequence[int]
    lefts: Sequence[int]
    """What is padded in front; behind, what the result needs."""
    dilation: Sequence[int]


def _overlapping(
    s: GraphEditor, node: Node, x: Node, windows: _Windows, kind: str, made: Sequence[int]
) -> Node:
    """A pool of [N, C, ...], over whole blocks along the tokens.

    ``made``: the shape of its result, but for the elements of each window.
    """
    rank = len(windows.kernel)
    is_alone = len(made) == rank + 1  # without a batch
    if is_alone:
        alone, x, made = x, s.make(node, aten.unsqueeze.default, x, 0), [1, *made]
        for d in range(rank + 1):
            s.tokens |= {x: d + 1} if s.along(alone, d) else {}
    pads, crops = [], {}
    for i, (step, left) in enumerate(zip(windows.stride, windows.lefts, strict=True)):
        dim, seen = 2 + i, windows.dilation[i] * (windows.kernel[i] - 1) + 1
        length = int(x.meta["val"].shape[dim])
        pair = (left, step * (made[dim] - 1) + seen - length - left)
        blocks = whole_blocks(s, node, x, dim, step, pair, seen, halo_pools.NOTHING[kind])
        if blocks is not None:
            x, pair = blocks
            crops[dim] = made[dim]
        pads.append(pair)
    y = s.make(
        node, halo_pools.pool, x, kind=kind, kernel=tuple(windows.kernel),
        stride=tuple(windows.stride), pads=tuple(pads), dilation=tuple(windows.dilation),
    )  # fmt: skip
    for dim, size in crops.items():
        y = _cut(s, node, y, dim, size)
    return s.make(node, aten.squeeze.dim, y, 0) if is_alone else y


def _only_first_is_read(node: Node) -> bool:
    return all(u.target is operator.getitem and u.args[1] == 0 for u in node.users)


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
    if not _only_first_is_read(node):
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
    s.tokens[rows] = 2
    windows = _Windows(kernel=[size], stride=[step], lefts=[pads[0]], dilation=[1])
    y = _overlapping(s, node, rows, windows, "each", [1, math.prod(others), made])
    opened = s.make(node, aten.reshape.default, y, [*others, made, size])
    return s.make(node, aten.movedim.int, opened, -2, dim)


def columns(s: GraphEditor, node: Node) -> Node | None:
    """im2col over tokens: the elements of each window as channels."""
    call = Call(node)
    x, kernel = call.operands[0], [int(n) for n in call["kernel_size"]]
    touched = any(s.touches(x, d) for d in (2, 3)) or s.touches(node, 2)
    if len(call.shapes[0]) != 4 or not x.meta["val"].is_floating_point() or not touched:
        return None
    stride, pads, dilation = (list(call[name]) for name in ("stride", "padding", "dilation"))
    windows = _Windows(kernel=kernel, stride=stride, lefts=pads, dilation=dilation)
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    made = [
        (int(n) + 2 * pad - span) // step + 1
        for n, pad, span, step in zip(call.shapes[0][2:], pads, spans, stride, strict=True)
    ]
    y = _overlapping(s, node, x, windows, "each", [*map(int, call.shapes[0][:2]), *made])
    turned = s.make(node, aten.permute.default, y, [0, 1, 4, 5, 2, 3])
    return s.make(node, aten.reshape.default, turned, [int(n) for n in call.result_shape])


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
