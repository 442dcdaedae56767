"""Makes nodes of a program that is normalized, and knows which dimensions hold tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from ringfx.passes.axes import AxisMap
from ringfx.passes.axes.call import Call
from ringfx.passes.capture.gradients import needs_grad
from ringfx.passes.token_axes.token_line import Lines, MaybeTokenDim, TokenDim

__all__ = ["GraphEditor", "bounds", "cat_dim"]

aten = torch.ops.aten


@dataclass
class GraphEditor:
    """Makes nodes, and knows which dimensions hold tokens."""

    graph: Graph
    axes: AxisMap
    lines: Lines
    changed: bool = False
    tokens: dict[Node, int] = field(default_factory=dict)
    """The token dimension of concatenations that were made here."""

    def make(self, before: Node, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        with self.graph.inserting_before(before):
            new = self.graph.call_function(target, args, kwargs)
        inputs = new.all_input_nodes
        new.meta = {k: v for k, v in before.meta.items() if k != "val"}
        values = [n.meta["val"] for n in inputs] or [before.meta["val"]]
        with values[0].fake_mode, torch.no_grad():
            given = torch.fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
            new.meta["val"] = target(*given[0], **given[1])
        if not any(needs_grad(n) for n in inputs):
            new.meta["ringfx_needs_grad"] = False
        return new

    def along(self, node: Node, dim: int) -> bool:
        """Whether a dimension of a value is tokens alone."""
        if node in self.tokens:
            return self.tokens[node] == dim
        place = self.token_dim(node)
        return isinstance(place, TokenDim) and place.dim == dim and place.outer * place.inner == 1

    def runs_along(self, node: Node, dim: int) -> bool:
        """Whether a dimension of a value is tokens, or the elements of one after the other's."""
        place = self.token_dim(node)
        is_run = isinstance(place, TokenDim) and place.dim == dim and place.outer == 1
        return is_run or self.along(node, dim)

    def touches(self, node: Node, dim: int) -> bool:
        """Whether tokens are a part of a dimension of a value, in whatever way."""
        place = self.token_dim(node)
        return isinstance(place, TokenDim) and place.dim == dim

    def token_dim(self, node: Node) -> MaybeTokenDim:
        return self.lines.token_dim(node) if node in self.axes.values else None

    def slice(self, before: Node, x: Node, dim: int, start: int, end: int) -> Node | None:
        """``x[start:end]``; of a concatenation made of what its pieces give; None if empty."""
        size = int(x.meta["val"].shape[dim])
        start, end = max(start, 0), min(end, size)
        if start >= end:
            return None
        if (start, end) == (0, size):
            return x
        if x.target is aten.cat.default and cat_dim(x) == dim:
            return self.cat(before, _cut_pieces(self, before, x, dim, start, end), dim)
        return self.make(before, aten.slice.Tensor, x, dim, start, end)

    def cat(self, before: Node, pieces: Sequence[Node | None], dim: int) -> Node:
        kept = [p for p in pieces if p is not None]
        if len(kept) == 1:
            return kept[0]
        new = self.make(before, aten.cat.default, kept, dim)
        self.tokens[new] = dim
        return new

    def constant(self, before: Node, like: Node, dim: int, length: int, value: float) -> Node:
        fake = like.meta["val"]
        shape = [length if i == dim else int(s) for i, s in enumerate(fake.shape)]
        new = self.make(before, aten.new_full.default, like, shape, value)
        new.meta["ringfx_needs_grad"] = False
        return new


def cat_dim(node: Node) -> int:
    call = Call(node)
    return call.dim("dim", len(call.result_shape))


def _cut_pieces(
    s: GraphEditor, before: Node, cat: Node, dim: int, start: int, end: int
) -> list[Node | None]:
    pieces: list[Node | None] = []
    at = 0
    for piece in cat.args[0]:  # type: ignore[union-attr]
        assert isinstance(piece, Node)
        size = int(piece.meta["val"].shape[dim])
        pieces.append(s.slice(before, piece, dim, start - at, end - at))
        at += size
    return pieces


def bounds(start: int | None, end: int | None, size: int) -> tuple[int, int]:
    first = 0 if start is None else start + size if start < 0 else start
    last = size if end is None else end + size if end < 0 else end
    return first, min(last, size)
