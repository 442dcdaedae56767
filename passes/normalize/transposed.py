"""Transposed convolutions over tokens: as many elements of each token as the stride, and no more.

What there is beyond that at the end belongs to tokens of zeros behind them, and what is missing is
cut off; so is what the user cuts off at both ends.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from ringfx.comm import halo_transposed
from ringfx.passes.axes.call import Call
from ringfx.passes.normalize.graph_editor import GraphEditor, bounds

__all__ = ["transposed_convolution"]

aten = torch.ops.aten


def transposed_convolution(s: GraphEditor, node: Node) -> Node | None:
    """In place of the call, or of it and the slice that alone reads it."""
    call = Call(node)
    touched = [d for d in range(2, len(call.shapes[0])) if s.runs_along(call.operands[0], d)]
    if not touched or len(call.shapes[0]) != len(call["stride"]) + 2:
        return None
    for last in (_cropped(node), node):
        new = _of_tokens(s, node, last, touched) if last is not None else None
        if new is None:
            continue
        if last is node:
            return new
        last.replace_all_uses_with(new)  # type: ignore[union-attr]
        s.changed = True
        return None
    return None


def _of_tokens(s: GraphEditor, node: Node, last: Node, touched: list[int]) -> Node | None:
    """``last``, which is the call or a slice of it; None if that is no part of what tokens make."""
    call = Call(node)
    x, weight, *bias = call.operands
    stride, dilation = list(call["stride"]), list(call["dilation"])
    lengths, made = [int(n) for n in call.shapes[0]], [int(n) for n in last.meta["val"].shape]
    crops = []
    for i, (step, apart, start) in enumerate(zip(stride, dilation, call["padding"], strict=True)):
        d = 2 + i
        if last is not node and Call(last).dim("dim", len(made)) == d:
            start += bounds(Call(last)["start"], None, int(call.result_shape[d]))[0]
        wanted = made[d]
        if d in touched:
            lengths[d] = max(lengths[d], -(-wanted // step))
            wanted = step * lengths[d]
        reach = apart * (int(call.shapes[1][d]) - 1) + 1
        crops.append((int(start), step * (lengths[d] - 1) + reach - int(start) - wanted))
        if crops[i][0] - crops[i][1] >= max(step, apart):
            return None
        if lengths[d] > int(call.shapes[0][d]) and not s.along(x, d):
            return None
    for d in touched:
        more = lengths[d] - int(x.meta["val"].shape[d])
        x = s.cat(node, [x, s.constant(node, x, d, more, 0) if more else None], d)
    new = s.make(
        node, halo_transposed.transposed_convolution, x, weight, *bias, stride=tuple(stride),
        crops=tuple(crops), dilation=tuple(dilation), groups=int(call["groups"]),
    )  # fmt: skip
    for d in touched:
        new = s.slice(node, new, d, 0, made[d]) or new
    return new


def _cropped(node: Node) -> Node | None:
    """The only user, if it is a slice of a spatial dimension."""
    users = list(node.users)
    if len(users) != 1 or users[0].target is not aten.slice.Tensor:
        return None
    call = Call(users[0])
    is_spatial = call.dim("dim", len(call.shapes[0])) >= 2
    return users[0] if is_spatial and call["step"] == 1 and 0 not in call.result_shape else None
