"""The program that one rank runs, while it is written."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from ringfx.comm import conjugate
from ringfx.ir.token_place import TokenPlace
from ringfx.ir.values import Collective, CommKind
from ringfx.passes.capture.gradients import needs_grad
from ringfx.passes.capture.origin import describe_node
from ringfx.passes.token_axes.axis_on_line import AxisOnLine
from ringfx.passes.token_axes.token_line import Lines, TokenDim

__all__ = ["COMPLETES_GRADIENT", "LocalGraph", "describe", "is_narrow", "num_bytes"]

aten = torch.ops.aten
COMPLETES_GRADIENT = "completes a gradient"


class LocalGraph:
    """One rank's program: which tokens it holds, sums over ranks, and what is sent."""

    def __init__(self, lines: Lines, group: str) -> None:
        self.graph = Graph()
        self.lines = lines
        self.group = group
        self.collectives: list[Collective] = []
        self.tokens: dict[Node, TokenPlace] = {}
        """Local values of which each rank has its tokens -> where they are."""
        self.partials: dict[Node, Node] = {}
        """Sums over tokens -> this rank's part."""
        self.last_input: Node | None = None
        self._positions: list[Node] = []
        self._orders: list[Node] = []
        self._made: dict[tuple[int, AxisOnLine, str], Node] = {}

    @property
    def ranks(self) -> int:
        return max((line.layout.world_size for line in self.lines.lines), default=1)

    def add_line_inputs(self) -> None:
        """Placeholders for each line: this rank's positions and the order of all ranks' tokens.

        One more stands for the call, see ``ringfx.comm.grad_accumulation``.
        """
        for line in self.lines.lines:
            if line.layout.world_size > 1:
                self._positions.append(self.graph.placeholder(f"positions_{line.index}"))
                self._orders.append(self.graph.placeholder(f"order_{line.index}"))
        if self._positions:
            self.call = self.graph.placeholder("call")
        inputs = [n for n in self.graph.nodes if n.op == "placeholder"]
        self.last_input = inputs[-1] if inputs else None

    def after_inputs(self) -> Node:
        """The last of the leading placeholders and conversions."""
        assert self.last_input is not None, "a program without inputs converts nothing"
        return self.after_conversions(self.last_input)

    def after_conversions(self, made: Node) -> Node:
        """The last of the conversions, and of the indices for them, that follow ``made``."""
        while made.next.meta.get("ringfx_conversion") or made.next.meta.get("ringfx_prologue"):
            made = made.next
        return made

    def holds_tokens(self, node: Node, tokens: TokenDim) -> None:
        """Each rank has its tokens of this local value."""
        self.tokens[node] = TokenPlace(dim=tokens.dim, outer=tokens.outer, inner=tokens.inner)

    def valid(self, tokens: TokenDim) -> Node:
        """bool [local tokens]: which local tokens are elements of the axis."""
        return self._indices(tokens, "valid")

    def index(self, tokens: TokenDim) -> Node:
        """int64 [local tokens]: the element that each local token is; where it is none, another.

        Padding goes round the axis instead of repeating its end: then it is as unlikely as real
        tokens to hold equal neighbours, whose difference a division would make NaN.
        """
        return self._indices(tokens, "index")

    def order(self, tokens: TokenDim) -> Node:
        """int64 [tokens]: where in the concatenation of all ranks' tokens each element is."""
        return self._indices(tokens, "order")

    def own(self, tokens: TokenDim) -> Node:
        """int64 [local tokens]: which element of the axis each local token is, if it is one."""
        return self._indices(tokens, "own")

    def where(self, tokens: TokenDim, value: Node) -> tuple[Any, ...]:
        """The last arguments of a conversion."""
        ranks = self.lines.lines[tokens.line].layout.world_size
        return (ranks, self.group, tokens.dim, tokens.outer, tokens.inner, describe(value))

    def shard(self, node: Node, replicated: Node) -> Node:
        """This rank's tokens of a replicated value, which are what the call gives."""
        tokens = self.lines.token_dim(node)
        assert isinstance(tokens, TokenDim)
        if needs_grad(node):
            self.report(
                node, CommKind.ALL_GATHER_GRADIENT, num_bytes(node), COMPLETES_GRADIENT,
                in_backward=True,
            )  # fmt: skip
        index, order = self.index(tokens), self.order(tokens)
        args = (replicated, index, order, *self.where(tokens, node))
        return self.graph.call_function(conjugate.slice_tokens, args)

    def reduce(self, node: Node, partial: Node) -> Node:
        """The sum of all ranks' parts, in the type that the value has."""
        if is_narrow(node):
            partial = self.graph.call_function(aten.to.dtype, (partial, torch.float32))
        return self.narrowed(node, self.total(node, partial))

    def total(self, node: Node, partial: Node) -> Node:
        """The sum; of float16 and bfloat16 in float32, as an operator sums that has them all."""
        size = num_bytes(node) * (2 if is_narrow(node) else 1)
        self.report(node, CommKind.ALL_REDUCE, size, "sums over tokens")
        self.partials[node] = partial
        args = (partial, self.group, describe(node))
        return self.graph.call_function(conjugate.sum_partials, args)

    def narrowed(self, node: Node, total: Node) -> Node:
        if not is_narrow(node):
            return total
        return self.graph.call_function(aten.to.dtype, (total, node.meta["val"].dtype))

    def report(
        self,
        node: Node,
        kind: CommKind,
        size: int,
        reason: str,
        *,
        in_backward: bool = False,
        ranks: int = 0,
    ) -> None:
        """Say in the plan that one collective runs; ``ranks``: over others than the sequence's."""
        self.collectives.append(
            Collective(
                node=node.name,
                name=node.meta.get("ringfx_path", "") or node.meta.get("ringfx_input", ""),
                source=node.meta.get("ringfx_source", ""),
                kind=kind,
                bytes_moved=size,
                reason=reason,
                in_backward=in_backward,
                ranks=ranks,
            )
        )

    def _indices(self, tokens: TokenDim, kind: str) -> Node:
        key = (tokens.line, tokens.member, kind)
        if key not in self._made:
            with self.graph.inserting_after(self.after_inputs()):
                self._made[key] = self._make(tokens, kind)
            if kind != "order":
                self.tokens[self._made[key]] = TokenPlace(dim=0, outer=1, inner=1)
        return self._made[key]

    def _make(self, tokens: TokenDim, kind: str) -> Node:
        """Indices of an axis, from its line's positions and order."""
        positions, order = self._positions[tokens.line], self._orders[tokens.line]
        member = tokens.member
        if kind == "order":
            return self._prologue(
                aten.slice.Tensor, order, 0, member.offset, member.offset + member.length
            )
        own = self._prologue(aten.sub.Tensor, positions, member.offset)
        if kind == "own":
            return own
        with self.graph.inserting_after(own):
            if kind == "index":
                return self._prologue(aten.remainder.Scalar, own, member.length)
            low = self._prologue(aten.ge.Scalar, own, 0)
        with self.graph.inserting_after(low):
            high = self._prologue(aten.lt.Scalar, own, member.length)
        with self.graph.inserting_after(high):
            return self._prologue(aten.logical_and.default, low, high)

    def _prologue(self, target: Any, *args: Any) -> Node:
        node = self.graph.call_function(target, args)
        node.meta["ringfx_prologue"] = True
        return node


def is_narrow(node: Node) -> bool:
    """Whether a value's type is one in which sums lose digits, or overflow."""
    return node.meta["val"].dtype in (torch.float16, torch.bfloat16)


def num_bytes(node: Node) -> int:
    value = node.meta["val"]
    return int(value.numel() * value.element_size())


def describe(node: Node) -> str:
    """What a collective sends, for an error: ``lm_head (model.py:61), aten.linear.default``."""
    if node.op != "placeholder":
        return describe_node(node)
    return f"input {node.meta.get('ringfx_input', node.name)}"
