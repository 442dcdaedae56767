"""One call of the user's program, and how one rank's call of it is emitted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch.fx import Graph, Node

from ringfx.ir.layout import Layout
from ringfx.ir.values import CommKind
from ringfx.passes.axes.call import Call, OpAxes
from ringfx.passes.axes.propagate import NamedOp
from ringfx.passes.split_modes.local_graph import LocalGraph, num_bytes
from ringfx.passes.token_axes.token_line import Lines, TokenDim

__all__ = ["LocalCall", "copied", "local_shape"]


@dataclass(frozen=True, eq=False, kw_only=True)
class LocalCall:
    """A call of the user's program, and what one rank's call is emitted with."""

    local: LocalGraph
    named: NamedOp
    operands: Sequence[Node]
    """Values of the local program, in the placements of the call's mode."""

    @property
    def graph(self) -> Graph:
        return self.local.graph

    @property
    def node(self) -> Node:
        return self.named.call.node

    @property
    def call(self) -> Call:
        return self.named.call

    @property
    def axes(self) -> OpAxes:
        return self.named.axes

    @cached_property
    def source(self) -> TokenDim:
        """Tokens of the first operand."""
        return self.tokens_of(self.call.operands[0])

    @cached_property
    def result(self) -> TokenDim:
        return self.tokens_of(self.node)

    def tokens_of(self, value: Node) -> TokenDim:
        tokens = self.local.lines.token_dim(value)
        assert isinstance(tokens, TokenDim), f"{value.name} has no token axis"
        return tokens

    def layout(self, tokens: TokenDim) -> Layout:
        return self.local.lines.lines[tokens.line].layout

    def has_padding(self, tokens: TokenDim) -> bool:
        return self.local.lines.lines[tokens.line].has_padding(tokens.member)

    def emit(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        return self.graph.call_function(function, args, kwargs)

    def copy(self) -> Node:
        """The same call on this rank's operands."""
        return copied(self.graph, self.node, self.operands)

    def with_operands(self, operands: Sequence[Node]) -> LocalCall:
        return replace(self, operands=operands)

    def report(self, kind: CommKind, size: int, reason: str, *, in_backward: bool = False) -> None:
        self.local.report(self.node, kind, size, reason, in_backward=in_backward)

    def report_halo(self, value: Node, num_tokens: int) -> None:
        """Say in the plan that every chunk receives tokens of its neighbours."""
        tokens = self.tokens_of(value)
        size = self.token_bytes(value) * num_tokens * self.layout(tokens).chunks_per_rank
        noun = "token" if num_tokens == 1 else "tokens"
        self.report(CommKind.HALO_EXCHANGE, size, f"halo of {num_tokens} {noun}")

    def token_bytes(self, value: Node) -> int:
        """Bytes of one token of a value."""
        return num_bytes(value) // max(self.tokens_of(value).member.length, 1)


def copied(graph: Graph, node: Node, operands: Sequence[Node]) -> Node:
    """The same call on other values, which are as many as it has nodes among its arguments."""
    replacements = iter(operands)
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: next(replacements))
    return graph.create_node(node.op, node.target, args, kwargs)


def local_shape(lines: Lines, node: Node, index: int = 0) -> tuple[int, ...]:
    """The shape on one rank of a value that is sharded."""
    value = node.meta["val"]
    value = value if isinstance(value, torch.Tensor) else value[index]
    tokens = lines.token_dim(node, index)
    shape = [int(s) for s in value.shape]
    if isinstance(tokens, TokenDim):
        length = lines.lines[tokens.line].layout.local_length
        shape[tokens.dim] = tokens.outer * length * tokens.inner
    return tuple(shape)
