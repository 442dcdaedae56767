"""Masks that a module keeps in a buffer, as functions of positions.

GPT-2's ``register_buffer("bias", torch.tril(torch.ones(n, n)))`` is an input of the program like
any other, and its values are known when the program is made. They are looked at once, when a mask
reads them (``matrices.py``). The program then holds for these values: the runner compares them in
every call and says so where they changed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from ringfx.ir.tiles import Expr, K, Q, const, map_children
from ringfx.ir.values import Captured
from ringfx.passes.exprs.elements import Index
from ringfx.passes.exprs.elements.rule import typed
from ringfx.passes.exprs.emitter import Emitter
from ringfx.passes.exprs.matrices import Formula, Matrix, formula_of
from ringfx.torch_compat.dispatch import disable_current_modes
from ringfx.torch_compat.fake_tensors import FakeTensor, unset_fake_temporarily

if TYPE_CHECKING:
    from ringfx.passes.exprs.lift import Lifter

__all__ = ["Buffers"]

aten = torch.ops.aten
Tensor = torch.Tensor


class Buffers:
    """What the values of a program's buffers and constants say of their indices."""

    def __init__(
        self,
        values: Mapping[Node, Tensor],
        given: Collection[Node] = (),
        unvalued: Collection[Node] = (),
    ) -> None:
        self.read: set[Node] = set()
        """Those whose values a mask now counts on."""
        self.given = frozenset(given)
        """Numbers that each call gives anew, and that are not trained: a mask may be among them."""
        self.missed: set[Node] = set()
        """Those that a mask reads and whose values cannot be looked at here."""
        self._values = values
        self._unvalued = frozenset(unvalued)
        self._known: dict[Node, _Known | None] = {}

    @staticmethod
    def of(captured: Captured) -> Buffers:
        gm = captured.graph_module
        values: dict[Node, Tensor] = {}
        given: list[Node] = []
        unvalued: list[Node] = []
        for i, node in enumerate(gm.graph.find_nodes(op="placeholder")):
            if i in captured.buffers:
                values[node] = captured.buffers[i]
                continue
            if i in captured.unvalued:
                unvalued.append(node)
            if not (captured.is_parameter[i] or captured.needs_grad[i]) and _is_numbers(node):
                given.append(node)
        for node in gm.graph.find_nodes(op="get_attr"):
            value = getattr(gm, str(node.target), None)
            if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor):
                values[node] = value
        return Buffers(values, given, unvalued)

    def has(self, node: Node) -> bool:
        return node in self._values

    def element(self, lifter: Lifter, node: Node, index: Index) -> Expr | None:
        """The element of a buffer as a function of its indices; None where there is none."""
        if node in self._unvalued:
            self.missed.add(node)
        if node not in self._values:
            return None
        if node not in self._known:
            self._known[node] = self._look(node)
        known = self._known[node]
        if known is None:
            return None
        self.read |= {node, known.node}
        return known.element(lifter, index)

    def _look(self, node: Node) -> _Known | None:
        value = self._values[node]
        with unset_fake_temporarily(), disable_current_modes(), torch.no_grad():
            for other in self._known.values():
                if other is not None and _are_equal(value, self._values[other.node]):
                    return other
            found = _ramp_of(value) or _formula_of(value)
        return None if found is None else _Known(node, value, found)


def _is_numbers(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


@dataclass(frozen=True)
class _Ramp:
    """``start + step * index`` along the only dimension."""

    start: int
    step: int


class _Known:
    """A buffer whose element is a formula of its indices."""

    def __init__(self, node: Node, value: Tensor, formula: Formula | _Ramp) -> None:
        self.node = node
        self._formula = formula
        self._dtype = value.dtype
        self._leading, self._ends = _dims(value)
        self._num_rows = value.shape[self._ends[0]] if len(self._ends) > 1 else 1
        self._table: Node | None = None

    def element(self, lifter: Lifter, index: Index) -> Expr:
        formula = self._formula
        places = [index[d] for d in self._ends]
        row, column = [*[const(0)] * (2 - len(places)), *places]
        if isinstance(formula, _Ramp):
            scaled = lifter.make("mul", column, const(formula.step))
            return lifter.make("add", scaled, const(formula.start))
        inside = self._inside(lifter, formula, index, row, column)
        if formula.keep is None:
            return inside
        kept = _at_indices(lifter, formula.keep, {Q: row, K: column})
        outside = typed(formula.outside, self._dtype)
        return lifter.make("where", kept, inside, outside)

    def _inside(
        self, lifter: Lifter, formula: Formula, index: Index, row: Expr, column: Expr
    ) -> Expr:
        if formula.inside is not None:
            return typed(formula.inside, self._dtype)
        leading = tuple(index[d] for d in self._leading)
        distance, zero = lifter.make("sub", column, row), self._num_rows - 1
        if formula.is_slope:
            slope = lifter.capture(self._by_distance(), (*leading, const(zero - 1)))
            cast = "float" if self._dtype == torch.float32 else "double"
            back = lifter.make(cast, lifter.make("sub", row, column))
            return lifter.make("mul", slope, back)
        place = lifter.make("add", distance, const(zero))
        return lifter.capture(self._by_distance(), (*leading, place))

    def _by_distance(self) -> Node:
        """The values by ``column - row + rows - 1``, as a value of the program."""
        if self._table is None:
            graph = self.node.graph
            last = graph.find_nodes(op="placeholder")[-1] if self.node.op == "placeholder" else None
            emit = Emitter(graph, (last or self.node).next)
            rows, columns = self._ends
            first_row = emit.call(aten.select.int, self.node, rows, 0)
            first_column = emit.call(aten.select.int, self.node, columns, 0)
            below = emit.call(aten.slice.Tensor, first_column, rows, 1, self._num_rows)
            below = emit.call(aten.flip.default, below, [rows])
            joined = emit.call(aten.cat.default, [below, first_row], rows)
            sizes = [*(self.node.meta["val"].shape[d] for d in self._leading), -1]
            self._table = emit.call(aten.reshape.default, joined, sizes)
        return self._table


def _at_indices(lifter: Lifter, expr: Expr, indices: Mapping[Expr, Expr]) -> Expr:
    """A condition on row and column with other indices in their places."""
    if expr in indices:
        return indices[expr]
    return map_children(lambda e: _at_indices(lifter, e, indices), expr, lifter.make)


def _dims(value: Tensor) -> tuple[list[int], list[int]]:
    """Leading dimensions of more than one element, and the last two of these (or fewer)."""
    long = [d for d, size in enumerate(value.shape) if size > 1]
    return long[:-2], long[-2:]


def _are_equal(a: Tensor, b: Tensor) -> bool:
    alike = (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device)
    return alike and torch.equal(a, b)


def _ramp_of(value: Tensor) -> _Ramp | None:
    """Positions: integers in equal steps."""
    leading, ends = _dims(value)
    counted = not value.dtype.is_floating_point and value.dtype != torch.bool
    if leading or len(ends) != 1 or not counted:
        return None
    flat = value.reshape(-1).to(torch.int64)
    start, step = int(flat[0]), int(flat[1] - flat[0])
    ramp = torch.arange(len(flat), device=flat.device) * step + start
    return _Ramp(start, step) if step and torch.equal(flat, ramp) else None


def _formula_of(value: Tensor) -> Formula | None:
    if value.dtype.is_complex or value.numel() == 0:
        return None
    _, ends = _dims(value)
    rows, columns = [*[1] * (2 - len(ends)), *(int(value.shape[d]) for d in ends)]
    found = formula_of(Matrix(value.detach().reshape(-1, rows, columns)))
    named = found is not None and found.keep is None and found.inside is not None
    return found if named or len(ends) > 1 else None  # other vectors are read token by token
