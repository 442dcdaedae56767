"""One operator call as a rule sees it, and what a rule says about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeAlias

import torch
from torch.fx import Node

from ringfx.passes.axes.how import How
from ringfx.torch_compat.operators import OpOverload, schema_of

__all__ = [
    "AxisRule", "AxisRules", "AxisSharing", "Call", "Labels", "OpAxes", "Window", "given_input",
]  # fmt: skip

Labels: TypeAlias = tuple[tuple[str, ...], ...]
"""For each dimension the labels that it is made of; () for a size-1 or broadcast dimension."""


class AxisSharing(Enum):
    """What an operator does when it is given only a part of the tokens along a label."""

    INDEPENDENT = "independent"
    """Works on its part alone; the result is sharded along the same label."""
    PARTIAL_SUM = "partial_sum"
    """The result is a partial sum."""
    NEEDS_ALL = "needs_all"
    """Needs all tokens."""


@dataclass(frozen=True)
class Window:
    """A result label that is ``source[start : start + length]`` (a slice of step 1)."""

    source: str
    result: str
    start: int
    length: int


@dataclass(frozen=True, kw_only=True)
class OpAxes:
    """The axes of one call: labels of operands and results, and what may be split.

    ``operands`` follows the order of tensor arguments in the call (``Call.operands``); None stands
    for an operand that must be replicated, whatever its axes.
    """

    operands: tuple[Labels | None, ...]
    results: tuple[Labels, ...]
    share: Mapping[str, AxisSharing] = field(default_factory=dict)
    windows: tuple[Window, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Sizes of labels that are only a part of a dimension in every operand."""
    how: How | None = None
    """What only its family of operators needs; None: labels say it all."""
    reason: str = ""
    """Why a label needs all tokens, in words."""

    def share_of(self, label: str) -> AxisSharing:
        return self.share.get(label, AxisSharing.INDEPENDENT)


class Call:
    """An operator call with its arguments by name and its tensor operands in order."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.arguments = _bind(node)
        self.operands: tuple[Node, ...] = tuple(_tensor_operands(node))

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.arguments.get(name, default)

    @property
    def name(self) -> str:
        return str(self.node.target)

    @property
    def shapes(self) -> tuple[torch.Size, ...]:
        return tuple(n.meta["val"].shape for n in self.operands)

    @property
    def result_shapes(self) -> tuple[torch.Size, ...]:
        return tuple(v.shape for v in result_values(self.node))

    @property
    def result_shape(self) -> torch.Size:
        return self.result_shapes[0]

    def position(self, name: str) -> int:
        """Index among the operands of a tensor argument."""
        return _operand_positions(self.node, self.arguments)[name]

    def shape(self, name: str) -> torch.Size:
        size: torch.Size = self[name].meta["val"].shape
        return size

    def dim(self, name: str, rank: int) -> int:
        """A dimension argument, made non-negative."""
        return int(self[name]) % max(rank, 1)


AxisRule: TypeAlias = Callable[[Call], OpAxes]

AxisRules: TypeAlias = Mapping[object, AxisRule]
"""Operators (OpOverload, or their names) -> what each does along its axes."""


def result_values(node: Node) -> tuple[torch.Tensor, ...]:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return (value,)
    if isinstance(value, (tuple, list)):
        return tuple(v for v in value if isinstance(v, torch.Tensor))
    return ()


def given_input(value: Node) -> Node | None:
    """The input of the program that a value is, or is cut out of: every rank has all of that."""
    while value.target is torch.ops.aten.slice.Tensor:
        value = value.all_input_nodes[0]
    return value if value.op in ("placeholder", "get_attr") else None


def _tensor_operands(node: Node) -> list[Node]:
    """Tensor arguments in the order in which torch.fx visits them, repeats kept."""
    found: list[Node] = []

    def visit(n: Node) -> Node:
        if isinstance(n.meta.get("val"), torch.Tensor):
            found.append(n)
        return n

    torch.fx.node.map_arg((node.args, node.kwargs), visit)
    return found


def _bind(node: Node) -> dict[str, Any]:
    target = node.target
    if not isinstance(target, OpOverload):
        positional: dict[Any, Any] = dict(enumerate(node.args))
        return positional | dict(node.kwargs)
    bound: dict[str, Any] = {}
    for i, argument in enumerate(schema_of(target).arguments):
        if i < len(node.args) and not argument.kwarg_only:
            bound[argument.name] = node.args[i]
        elif argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        else:
            bound[argument.name] = argument.default_value
    return bound


def _operand_positions(node: Node, arguments: Mapping[str, Any]) -> dict[str, int]:
    positions: dict[str, int] = {}
    count = 0
    for name, value in arguments.items():
        if isinstance(value, Node) and isinstance(value.meta.get("val"), torch.Tensor):
            positions[name] = count
            count += 1
        elif isinstance(value, (tuple, list)):
            count += sum(isinstance(v, Node) for v in value)
    return positions
