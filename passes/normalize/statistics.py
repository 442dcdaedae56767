"""Statistics over tokens, as sums: variances, norms, and what group norm makes of them."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from ringfx.passes.axes.call import Call
from ringfx.passes.normalize.graph_editor import GraphEditor

__all__ = ["VARIANCES", "group_norm", "variance", "vector_norm"]

aten = torch.ops.aten
NARROW = (torch.float16, torch.bfloat16)


def variance(s: GraphEditor, node: Node) -> Node | None:
    """``var``, ``std``, and both with the mean."""
    call = Call(node)
    x, dims = call.operands[0], _dims(call)
    if not any(s.touches(x, d) for d in dims) or not x.meta["val"].is_floating_point():
        return None
    dtype, keepdim = x.meta["val"].dtype, bool(call.get("keepdim", False))
    wide = _wide(s, node, x)
    correction = call["correction"] if "correction" in call.arguments else int(call["unbiased"])
    less = 1 if correction is None else correction
    count = math.prod(int(call.shapes[0][d]) for d in dims)
    if count <= less:
        return None
    mean = s.make(node, aten.mean.dim, wide, dims, True)
    off = s.make(node, aten.sub.Tensor, wide, mean)
    square = s.make(node, aten.mul.Tensor, off, off)
    total = s.make(node, aten.sum.dim_IntList, square, dims, keepdim)
    found = s.make(node, aten.div.Scalar, total, float(count - less))
    if "std" in call.name:
        found = _root(s, node, found)
    found = _narrow(s, node, found, dtype)
    if len(call.result_shapes) == 1:
        return found
    if not keepdim:
        mean = s.make(node, aten.squeeze.dims, mean, dims)
    results = found, _narrow(s, node, mean, dtype)
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
        s.changed = True
    return None


def vector_norm(s: GraphEditor, node: Node) -> Node | None:
    """The root of the sum of squares."""
    call = Call(node)
    x, dims = call.operands[0], _dims(call)
    if call["ord"] != 2 or call.get("dtype") is not None or not any(s.touches(x, d) for d in dims):
        return None
    if not x.meta["val"].is_floating_point():
        return None
    wide = _wide(s, node, x)
    square = s.make(node, aten.mul.Tensor, wide, wide)
    total = s.make(node, aten.sum.dim_IntList, square, dims, bool(call["keepdim"]))
    return _narrow(s, node, _root(s, node, total), x.meta["val"].dtype)


def group_norm(s: GraphEditor, node: Node) -> Node | None:
    call = Call(node)
    x, shape, groups = call.operands[0], [int(n) for n in call.shapes[0]], int(call["num_groups"])
    if not any(s.touches(x, d) for d in range(2, len(shape))) or not call["eps"]:
        return None
    sizes = [shape[0], groups, shape[1] // groups, *shape[2:]]
    dims = list(range(2, len(sizes)))
    wide = s.make(node, aten.reshape.default, _wide(s, node, x), sizes)
    mean = s.make(node, aten.mean.dim, wide, dims, True)
    off = s.make(node, aten.sub.Tensor, wide, mean)
    square = s.make(node, aten.mul.Tensor, off, off)
    spread = s.make(node, aten.mean.dim, square, dims, True)
    scale = s.make(node, aten.rsqrt.default, s.make(node, aten.add.Scalar, spread, call["eps"]))
    found = s.make(node, aten.mul.Tensor, off, scale)
    found = s.make(node, aten.reshape.default, found, shape)
    for name, target in (("weight", aten.mul.Tensor), ("bias", aten.add.Tensor)):
        if isinstance(call[name], Node):
            sizes = [shape[1], *(1,) * (len(shape) - 2)]
            per_channel = s.make(node, aten.reshape.default, call[name], sizes)
            found = s.make(node, target, found, per_channel)
    return _narrow(s, node, found, x.meta["val"].dtype)


def _dims(call: Call) -> list[int]:
    rank, given = len(call.shapes[0]), call.get("dim")
    if given is None or given == []:
        return list(range(rank))
    return [d % rank for d in ([given] if isinstance(given, int) else given)]


def _root(s: GraphEditor, node: Node, x: Node) -> Node:
    """The root, with a gradient of 0 at 0, as the operators have it."""
    is_zero = s.make(node, aten.eq.Scalar, x, 0)
    safe = s.make(node, aten.masked_fill.Scalar, x, is_zero, 1.0)
    root = s.make(node, aten.sqrt.default, safe)
    return s.make(node, aten.masked_fill.Scalar, root, is_zero, 0.0)


def _wide(s: GraphEditor, node: Node, x: Node) -> Node:
    if x.meta["val"].dtype not in NARROW:
        return x
    return s.make(node, aten.to.dtype, x, torch.float32)


def _narrow(s: GraphEditor, node: Node, x: Node, dtype: torch.dtype) -> Node:
    return x if x.meta["val"].dtype == dtype else s.make(node, aten.to.dtype, x, dtype)


VARIANCES: Sequence[Any] = (
    aten.var.correction, aten.var.dim, aten.var.default, aten.std.correction, aten.std.dim,
    aten.std.default, aten.var_mean.correction, aten.std_mean.correction,
)  # fmt: skip
