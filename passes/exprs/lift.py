"""One element of a graph value as an expression of its indices.

``Lifter.element(node, (e0, e1, ...))`` answers "what is node[e0, e1, ...]?" by asking the node's
operands the same question: views move indices, pointwise operators combine elements, an indexing
operator composes indices, arange is its own index. Where that ends (an input, a cumulative sum) the
value itself is captured and read with ``at``. Everything is O(1) in the sequence length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from ringfx.ir import tiles
from ringfx.ir.tiles import (
    TILE_OPS,
    Box,
    Expr,
    const,
    depth,
    inputs_used,
    map_children,
    walk,
)
from ringfx.ir.tiles.operators import UNTRAINED
from ringfx.passes.axes.call import Call, given_input
from ringfx.passes.capture.gradients import needs_grad
from ringfx.passes.exprs.buffers import Buffers
from ringfx.passes.exprs.constants import fold_constant
from ringfx.passes.exprs.elements import ELEMENT_RULES, Index
from ringfx.passes.exprs.ranged import Ranges

__all__ = ["Index", "Lifter", "Lifters", "lifted", "renumbered"]

LARGEST = 400
"""Parts of an expression; a value that would take more is captured."""
DEEPEST = 60
"""Parts inside each other, at most; every pass over expressions calls itself for each."""
FAR = 40
"""Operators in a row that are lifted by calls inside each other, each some frames of Python."""


class _TooFar(Exception):
    """No error: an element is asked for at the end of a long way, which is gone in stretches."""

    def __init__(self, key: tuple[Node, Index]) -> None:
        super().__init__(key)
        self.key = key


class Lifter:
    """Lifts values of one program; remembers which tensors the expressions capture.

    Parameters
    ----------
    box
        The ranges of the index variables, where they are known.
    same
        For each value the first one that is computed alike (``first_of_equals``).
    leaves
        Values that are expressions of their own, whatever computes them.
    buffers
        Inputs whose values are known.
    """

    def __init__(
        self,
        box: Box | None = None,
        same: Mapping[Node, Node] | None = None,
        leaves: Mapping[Node, Expr] | None = None,
        buffers: Buffers | None = None,
    ) -> None:
        self.captured: list[Node] = []
        self._ranges = Ranges(box)
        self.same = same or {}
        self._leaves = leaves or {}
        self._buffers = buffers or Buffers({})
        self._memo: dict[tuple[Node, Index], Expr] = {}
        self._way = 0

    def element(self, value: Any, index: Index) -> Expr:
        """``value[index]``; a Python number is itself."""
        if not isinstance(value, Node):
            return const(value)
        if value in self._leaves:
            return self._leaves[value]
        key = (self.same.get(value, value), index)
        if key not in self._memo:
            if self._way == FAR:
                raise _TooFar(key)
            self._memo[key] = self._stepped(key) if self._way else self._from_the_end(key)
        return self._memo[key]

    def _stepped(self, key: tuple[Node, Index]) -> Expr:
        self._way += 1
        try:
            return self._lift(*key)
        finally:
            self._way -= 1

    def _from_the_end(self, key: tuple[Node, Index]) -> Expr:
        """A chain of hundreds of operators is lifted in stretches, the last one first."""
        waiting = [key]
        while True:
            try:
                made = self._memo[waiting[-1]] = self._stepped(waiting[-1])
            except _TooFar as far:
                waiting.append(far.key)
                continue
            if waiting.pop() == key:
                return made

    def aligned(self, value: Any, index: Index) -> Expr:
        """The element of an operand that broadcasts to a result of this index."""
        if not isinstance(value, Node):
            return const(value)
        shape = value.meta["val"].shape
        own = index[len(index) - len(shape) :]
        return self.element(
            value, tuple(const(0) if s == 1 else e for s, e in zip(shape, own, strict=True))
        )

    def make(self, head: str, *args: Expr) -> Expr:
        """``(head, *args)`` in normal form, given the ranges of the indices."""
        return self._ranges.make(head, *args)

    def ends(self, expr: Expr) -> tuple[int, int] | None:
        """Smallest and largest value of an integer expression, or None."""
        return self._ranges.ends(expr)

    def inside(self, value: Node, expr: Expr, size: int) -> Expr:
        """An index of ``value`` as Python means it: a negative one counts from the end."""
        ends = self.ends(expr)
        if (ends and ends[0] >= 0) or not self.is_lifted(value):
            return expr
        wrapped = self.make("add", expr, const(size))
        return self.make("where", self.make("lt", expr, const(0)), wrapped, expr)

    def is_lifted(self, value: Node) -> bool:
        return value in self._leaves or value.target in ELEMENT_RULES or self._buffers.has(value)

    def _lift(self, node: Node, index: Index) -> Expr:
        if _cuts_gradient(node):
            return self.capture(node, index)
        rule = ELEMENT_RULES.get(node.target)
        lifted = rule(self, Call(node), index) if rule is not None else None
        if lifted is None or _is_large(lifted):
            lifted = fold_constant(node, index)
        if lifted is None:
            lifted = self._buffers.element(self, node, index)
        if lifted is None or self._compares_pairs(node, lifted) or _loses_gradient(node, lifted):
            return self.capture(node, index)
        return lifted

    def _compares_pairs(self, node: Node, lifted: Expr) -> bool:
        """Whether it compares numbers of pairs of tokens that the program computes: the truth
        values take less memory, and ask for no gradient."""
        value = node.meta["val"]
        is_comparison = value.dtype == torch.bool and not any(
            n.meta["val"].dtype == torch.bool for n in Call(node).operands
        )
        return is_comparison and any(
            given_input(self.captured[i]) is None for i in tiles.matrices(lifted)
        )

    def reads_given(self, expr: Expr) -> bool:
        """Whether it reads numbers that each call gives anew, a mask perhaps."""
        return any(self.captured[i] in self._buffers.given for i in inputs_used(expr))

    def capture(self, node: Node, index: Index) -> Expr:
        """The element as it is read from the value itself."""
        if node not in self.captured:
            self.captured.append(node)
        return ("at", self.captured.index(node), *index)


def _cuts_gradient(node: Node) -> bool:
    """Whether it is made without gradient of something trained, as under ``torch.no_grad``: looked
    through, it would give what it was made of a gradient that the program does not."""
    value = node.meta.get("val")
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return floating and not needs_grad(node) and any(map(needs_grad, node.all_input_nodes))


def _loses_gradient(node: Node, lifted: Expr) -> bool:
    """Whether it trains what a tile function has no gradient for."""
    op = TILE_OPS.get(lifted[0])
    return op is not None and op.pull is None and lifted[0] not in UNTRAINED and needs_grad(node)


class Lifters:
    """One lifter for each set of index ranges: equal masks of many layers are lifted once."""

    def __init__(self, same: Mapping[Node, Node], buffers: Buffers) -> None:
        self._same = same
        self._buffers = buffers
        self._found: dict[Box, Lifter] = {}

    def of(self, box: Box) -> Lifter:
        return self._found.setdefault(box, Lifter(box, self._same, buffers=self._buffers))


def _is_large(expr: Expr) -> bool:
    """In parts, or in parts that stand inside each other."""
    return any(i >= LARGEST for i, _ in enumerate(walk(expr))) or depth(expr) > DEEPEST


def lifted(expr: Expr, lifter: Lifter, values: Sequence[object]) -> Expr:
    """The expression with every value that it reads lifted to what it is made of."""
    if expr[0] == "at":
        return lifter.element(values[expr[1]], tuple(lifted(e, lifter, values) for e in expr[2:]))
    return map_children(lambda e: lifted(e, lifter, values), expr, lifter.make)


def renumbered(
    exprs: Sequence[Expr | None], captured: Sequence[Node]
) -> tuple[tuple[Expr | None, ...], list[Node]]:
    """The expressions with the captured values that they read, numbered from 0."""
    used = inputs_used(*exprs)
    places = {old: new for new, old in enumerate(used)}

    def moved(expr: Expr) -> Expr:
        expr = map_children(moved, expr)
        return ("at", places[expr[1]], *expr[2:]) if expr[0] == "at" else expr

    return tuple(None if e is None else moved(e) for e in exprs), [captured[i] for i in used]
