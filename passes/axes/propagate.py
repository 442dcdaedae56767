"""Name the axes of every value of a program in one walk; unite and cut as operators ask."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from ringfx.passes.axes.call import (
    AxisRules,
    AxisSharing,
    Call,
    Labels,
    OpAxes,
    Window,
    result_values,
)  # fmt: skip
from ringfx.passes.axes.how import Attend, Reshape
from ringfx.passes.axes.rules import RULES, find_rule
from ringfx.passes.axes.space import AxisClash, AxisSpace, Dim

__all__ = [
    "AxisMap",
    "BoundWindow",
    "NamedOp",
    "bind",
    "fresh_dims",
    "name_axes",
    "results_of",
]

NO_RULE = "the axis table has no row for this operator"


@dataclass(frozen=True, eq=False, kw_only=True)
class NamedOp:
    """A call with its labels bound to dimensions of the program's axis space."""

    call: Call
    axes: OpAxes
    bound: Mapping[str, Dim]
    clash: bool = False


@dataclass(frozen=True, eq=False, kw_only=True)
class BoundWindow:
    """``result = source[start : start + length]`` as axes of the program."""

    node: Node
    source: Dim
    result: Dim
    start: int
    length: int


@dataclass(frozen=True, eq=False, kw_only=True)
class AxisMap:
    """The axes of one program."""

    space: AxisSpace
    values: Mapping[Node, tuple[tuple[Dim, ...], ...]]
    """For each value, for each of its tensors, for each dimension, its axes (unresolved)."""
    ops: Mapping[Node, NamedOp]
    missing: tuple[Node, ...]
    """Calls without a row in the axis table."""
    windows: tuple[BoundWindow, ...]
    """The slices of step 1, in program order."""
    rules: AxisRules
    """By which the axes were named."""

    def dims(self, node: Node, index: int = 0) -> tuple[Dim, ...]:
        return tuple(self.space.resolve(dim) for dim in self.values[node][index])

    def label(self, node: Node, name: str) -> Dim:
        return self.space.resolve(self.ops[node].bound.get(name, ()))


def name_axes(graph: torch.fx.Graph, rules: AxisRules = RULES) -> AxisMap:
    """Follow every axis through the program."""
    space = AxisSpace()
    values: dict[Node, tuple[tuple[Dim, ...], ...]] = {}
    ops: dict[Node, NamedOp] = {}
    missing: list[Node] = []
    windows: list[BoundWindow] = []
    for node in graph.nodes:
        results = result_values(node)
        if node.target is operator.getitem:
            source, index = node.args
            values[node] = (values[source][index],)
            continue
        if not results:
            continue
        if node.op != "call_function":
            values[node] = fresh_dims(space, node)
            continue
        call = Call(node)
        rule = find_rule(node.target, rules)
        axes = rule(call) if rule else _opaque(call)
        if rule is None:
            missing.append(node)
        operands = [values[n][0] for n in call.operands]
        if isinstance(axes.how, Attend):
            axes = _read_by_batch(space, operands, axes, axes.how.captured)
        bound, clash = bind(space, operands, axes)
        values[node] = results_of(space, operands, call, axes, bound)
        named = NamedOp(call=call, axes=axes, bound=bound, clash=clash)
        ops[node] = named
        windows += [_window(named, w) for w in named.axes.windows]
    return AxisMap(
        space=space, values=values, ops=ops, missing=tuple(missing), windows=tuple(windows),
        rules=rules,
    )  # fmt: skip


def _read_by_batch(
    space: AxisSpace, operands: Sequence[tuple[Dim, ...]], axes: OpAxes, captured: Collection[int]
) -> OpAxes:
    """An attention's row without labels for what it reads whose rows are entries of its batch.

    Pairs of residues attend along their rows with a bias that is made of the pairs: to name its
    rows as the queries would make one axis of the rows and columns of all pairs.
    """
    batch = {atom for dim in operands[0][:-2] for atom in space.resolve(dim)}
    found = [
        None
        if i in captured and any(batch & set(space.resolve(d)) for d in _labelled(dims, labels))
        else labels
        for i, (dims, labels) in enumerate(zip(operands, axes.operands, strict=True))
    ]
    return replace(axes, operands=tuple(found))


def _labelled(dims: tuple[Dim, ...], labels: Labels | None) -> list[Dim]:
    """The dimensions whose label the queries have too."""
    return [dim for dim, names in zip(dims, labels or (), strict=False) if "s" in names]


def fresh_dims(space: AxisSpace, node: Node) -> tuple[tuple[Dim, ...], ...]:
    return tuple(tuple(space.fresh(int(s)) for s in v.shape) for v in result_values(node))


def _opaque(call: Call) -> OpAxes:
    """No row: every axis is new and everything is replicated."""
    results: tuple[Labels, ...] = tuple(
        tuple((f"r{n}.{i}",) if s != 1 else () for i, s in enumerate(shape))
        for n, shape in enumerate(call.result_shapes)
    )
    return OpAxes(
        operands=(None,) * len(call.operands),
        results=results,
        share={x: AxisSharing.NEEDS_ALL for dims in results for dim in dims for x in dim},
        reason=NO_RULE,
    )


def bind(
    space: AxisSpace, operands: Sequence[tuple[Dim, ...]], axes: OpAxes
) -> tuple[dict[str, Dim], bool]:
    """Bind each label to the dimensions of the operands that carry it; and whether any clashed."""
    bound: dict[str, Dim] = {}
    clash = False
    for dims, labels in zip(operands, axes.operands, strict=True):
        if labels is None:
            continue
        for dim, names in zip(dims, labels, strict=True):
            if len(names) > 1 and axes.sizes:
                clash |= not _compose(space, bound, names, dim, axes.sizes)
            if len(names) != 1:
                continue
            (name,) = names
            if name not in bound:
                bound[name] = dim
                continue
            try:
                space.unify(bound[name], dim)
            except AxisClash:
                clash = True
    return bound, clash


def _compose(
    space: AxisSpace,
    bound: dict[str, Dim],
    names: tuple[str, ...],
    dim: Dim,
    sizes: Mapping[str, int],
) -> bool:
    """A dimension made of several labels; whether it could be cut into them."""
    for name in names:
        bound.setdefault(name, space.fresh(sizes[name]))
    try:
        space.unify(tuple(axis for name in names for axis in bound[name]), dim)
    except AxisClash:
        return False
    return True


def results_of(
    space: AxisSpace,
    operands: Sequence[tuple[Dim, ...]],
    call: Call,
    axes: OpAxes,
    bound: dict[str, Dim],
) -> tuple[tuple[Dim, ...], ...]:
    """The results' dimensions; labels that only they carry are added to ``bound``."""
    shapes = call.result_shapes
    if isinstance(axes.how, Reshape):
        try:
            return (space.regroup(operands[0], [int(s) for s in shapes[0]]),)
        except AxisClash:
            return fresh_dims(space, call.node)
    results: list[tuple[Dim, ...]] = []
    for shape, labels in zip(shapes, axes.results, strict=True):
        for size, names in zip(shape, labels, strict=True):
            _bind_new(space, bound, names, int(size))
        results.append(
            tuple(tuple(axis for name in names for axis in bound[name]) for names in labels)
        )
    return tuple(results)


def _bind_new(space: AxisSpace, bound: dict[str, Dim], names: tuple[str, ...], size: int) -> None:
    """Make an axis for a label that no operand carries; its size is what the others leave."""
    unknown = [name for name in names if name not in bound]
    assert len(unknown) <= 1, f"labels {unknown} of one dimension are both unknown"
    known = space.size(
        axis for name in names if name in bound for axis in space.resolve(bound[name])
    )
    for name in unknown:
        bound[name] = space.fresh(size // known)


def _window(named: NamedOp, window: Window) -> BoundWindow:
    return BoundWindow(
        node=named.call.node,
        source=named.bound[window.source],
        result=named.bound[window.result],
        start=window.start,
        length=window.length,
    )
