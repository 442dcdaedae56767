"""``x.masked_scatter(mask, rows)`` of whole rows, as a lookup: the n-th token takes the n-th row.

So image features are put at their places among the tokens of a text. How many tokens are picked
before each is a sum along them, and the rows are a table.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from ringfx.passes.axes.call import Call
from ringfx.passes.normalize.graph_editor import GraphEditor

__all__ = ["masked_scatter"]

aten = torch.ops.aten


def masked_scatter(s: GraphEditor, node: Node) -> Node | None:
    """Of [B, tokens, C] or [tokens, C], where the mask is alike for all channels."""
    x, mask, source = Call(node).operands
    shape = [int(n) for n in x.meta["val"].shape]
    rank = len(shape)
    if rank not in (2, 3) or not s.touches(x, rank - 2) or not source.meta["val"].numel():
        return None
    rows = _of_rows(mask)
    if rows is None or [int(n) for n in rows.meta["val"].shape] != [*shape[:-1], 1]:
        return None
    picked = s.make(node, aten.to.dtype, s.make(node, aten.squeeze.dim, rows, -1), torch.int64)
    place = s.make(node, aten.cumsum.default, picked, rank - 2)
    if rank == 3:
        each = s.make(node, aten.sum.dim_IntList, picked, [1], True)
        before = s.make(node, aten.sub.Tensor, s.make(node, aten.cumsum.default, each, 0), each)
        place = s.make(node, aten.add.Tensor, place, before)
    place = s.make(node, aten.clamp.default, s.make(node, aten.sub.Tensor, place, 1), 0)
    table = s.make(node, aten.reshape.default, source, [-1, shape[-1]])
    found = s.make(node, aten.index.Tensor, table, [place])
    return s.make(node, aten.where.self, rows, found, x)


def _of_rows(mask: Node) -> Node | None:
    """The mask with one channel, which is expanded to all."""
    while int(mask.meta["val"].shape[-1]) != 1:
        if mask.target not in _SAME:
            return None
        (mask,) = Call(mask).operands[:1]
        if mask.meta["val"].dtype is not torch.bool or not mask.meta["val"].dim():
            return None
    return mask


_SAME = frozenset({
    aten.expand.default, aten.expand_as.default, aten.to.dtype, aten.to.device, aten.alias.default,
    aten._to_copy.default, aten.clone.default, aten.contiguous.default,
})  # fmt: skip
