"""The axes of a torch.autograd.Function, read off its forward and the backward its author wrote.

Nobody says what a hand-written backward computes, so both bodies are walked with the axis table:
an axis a of the operands may be split if, in the joint program

    results, saved = forward(operands);  gradients = backward(gradients of the results, saved)

every call runs on its own part of a, every result carries a, and for each gradient of the backward

1. where the incoming gradients are zero it is zero (padded tokens, other ranks' tokens), and
2. it carries a as its operand does; or it is a sum over a of such values, with nothing after the
   sum but what is linear: then it is a partial sum, as that of any shared operand.

Any other axis must be whole: the call runs on gathered values.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from typing import Any, TypeAlias, cast

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from ringfx.errors import CaptureRefused
from ringfx.passes.axes import how
from ringfx.passes.axes.call import AxisRules, AxisSharing, Call, Labels, OpAxes
from ringfx.passes.axes.propagate import AxisMap, NamedOp, name_axes
from ringfx.passes.axes.space import AxisClash, Dim
from ringfx.passes.capture.functional import functionalize
from ringfx.passes.capture.own_backward import OwnBackward
from ringfx.passes.capture.precision import AutocastInterpreter
from ringfx.torch_compat.fake_tensors import detect_fake_mode
from ringfx.torch_compat.operators import OpOverload

__all__ = ["own_backward"]

aten = torch.ops.aten
REASON = "it is a torch.autograd.Function with a backward of its own"


class Kind(Enum):
    """What a value of the backward is, with respect to one axis."""

    FREE = "free"
    """It does not depend on the incoming gradients."""
    OWN = "own"
    """It carries the axis and is zero wherever the incoming gradients are."""
    PARTIAL = "partial"
    """A sum over the axis of such values: each rank has its part."""


Kinds: TypeAlias = dict[Node, Kind]


def own_backward(call: Call, rules: AxisRules) -> OpAxes:
    """Labels of operands and results, independent or needed whole; worked out once a call."""
    known = call.node.meta.setdefault("ringfx_own_axes", {})
    if call.shapes not in known:
        known[call.shapes] = _read(call, rules)
    found: OpAxes = known[call.shapes]
    return found


def _read(call: Call, rules: AxisRules) -> OpAxes:
    joint = _Joint(call, rules)
    local = {a for a in joint.atoms() if joint.may_split(a)}
    labels = [joint.labels(n) for n in (*joint.operands, *joint.results)]
    names = {f"a{a}": a for a in joint.atoms()}
    num = len(joint.operands)
    return OpAxes(
        operands=tuple(labels[:num]),
        results=tuple(labels[num:]),
        share={name: AxisSharing.NEEDS_ALL for name, a in names.items() if a not in local},
        sizes={name: joint.axes.space.size((a,)) for name, a in names.items()},
        reason=REASON,
    )


class _Joint:
    """Forward and backward of one call as one named program."""

    def __init__(self, call: Call, rules: AxisRules) -> None:
        graph = _trace(call).graph
        given = graph.find_nodes(op="placeholder")
        num_operands = len(call.operands)
        self.operands: Sequence[Node] = given[:num_operands]
        returned = cast(tuple[Sequence[Node], Sequence[Node | None]], graph.output_node().args[0])
        self.results, self.gradients = returned
        self.incoming: Sequence[Node] = given[num_operands:]
        self.axes: AxisMap = name_axes(graph, rules)
        self.nodes = [n for n in graph.nodes if n in self.axes.values and n.op != "placeholder"]
        pairs = [*zip(self.results, self.incoming, strict=True), *self._pairs()]
        self.clash = not all(self._unite(a, b) for a, b in pairs)

    def _pairs(self) -> Iterator[tuple[Node, Node]]:
        """Operands with their gradients."""
        for operand, gradient in zip(self.operands, self.gradients, strict=True):
            if gradient is not None:
                yield operand, gradient

    def _unite(self, a: Node, b: Node) -> bool:
        try:
            for x, y in zip(self.axes.dims(a), self.axes.dims(b), strict=True):
                self.axes.space.unify(x, y)
        except (AxisClash, AssertionError, ValueError):
            return False
        return True

    def labels(self, node: Node) -> Labels:
        return tuple(tuple(f"a{a}" for a in dim) for dim in self.axes.dims(node))

    def atoms(self) -> list[int]:
        found = [a for n in (*self.operands, *self.results) for a in self._carried(n)]
        return list(dict.fromkeys(found))

    def _carried(self, node: Node) -> list[int]:
        every = range(len(self.axes.values[node]))
        return [a for i in every for dim in self.axes.dims(node, i) for a in dim]

    def may_split(self, atom: int) -> bool:
        if self.clash or not all(self._carried(r).count(atom) == 1 for r in self.results):
            return False
        kinds: Kinds = dict.fromkeys(self.incoming, Kind.OWN)
        for node in self.nodes:
            kind = self._kind(node, atom, kinds)
            if kind is None:
                return False
            kinds[node] = kind
        return all(
            kinds.get(gradient) is (Kind.OWN if atom in self._carried(operand) else Kind.PARTIAL)
            for operand, gradient in self._pairs()
        )

    def _kind(self, node: Node, atom: int, kinds: Kinds) -> Kind | None:
        """What a call makes of its operands on a part of the axis; None if it needs all of it."""
        if node.target is operator.getitem:
            return kinds.get(node.args[0], Kind.FREE)  # type: ignore[arg-type]
        named = self.axes.ops.get(node)
        carries = self._carried(node).count(atom)
        if named is None:  # a constant of the program
            return None if carries else Kind.FREE
        operands = [kinds.get(n, Kind.FREE) for n in named.call.operands]
        operands = operands[:1] if node.target in LIKE else operands
        carrying = [self._carried(n).count(atom) for n in named.call.operands]
        if not carries and not any(carrying):
            return _after_sum(node, operands)
        if max(carries, *carrying, 0) > 1 or not self._runs_on_parts(named, atom, bool(carries)):
            return None
        if Kind.PARTIAL in operands:
            return None
        if carries:
            return _on_own(named.call, operands)
        sums = node.target in SUMS and all(carrying) and _on_own(named.call, operands) is Kind.OWN
        return Kind.PARTIAL if sums else None

    def _runs_on_parts(self, named: NamedOp, atom: int, keeps: bool) -> bool:
        axes, dims = named.axes, self.axes.dims(named.call.node)
        if named.clash or named.call.node in self.axes.missing:
            return False
        match axes.how:
            case how.Draw() | how.Attend() | how.Reshard() | how.Halo():
                return False
            case how.Concat(dim=dim) if atom in dims[dim]:
                return False
            case how.Sum(mean=True) | how.Pick() if not keeps:
                return False
            case how.Reshape() | how.SizeArgument():
                return keeps and self._follows(named.call, atom)
        moved = {label for w in axes.windows for label in (w.source, w.result)}
        moved |= set(axes.how.numbers) if isinstance(axes.how, how.Lookup) else set()
        wanted = AxisSharing.INDEPENDENT if keeps else AxisSharing.PARTIAL_SUM
        return all(
            axes.share_of(label) is wanted and label not in moved
            for label, dim in named.bound.items()
            if atom in self.axes.space.resolve(dim)
        )

    def _follows(self, call: Call, atom: int) -> bool:
        """Whether the size of the axis is left open (-1) in the arguments of a reshape, or is that
        of another tensor."""
        if len(call.operands) == 2:
            dims_of = self.axes.dims
            return dims_of(call.operands[1]) == dims_of(call.node)
        asked = next((x for x in call.node.args[1:] if isinstance(x, (list, tuple))), ())
        dims: tuple[Dim, ...] = self.axes.dims(call.node)
        return len(asked) == len(dims) and all(
            size == -1 for size, dim in zip(asked, dims, strict=True) if atom in dim
        )


def _on_own(call: Call, operands: Sequence[Kind]) -> Kind | None:
    """A call on parts of the axis: zero where the incoming gradients are, or free of them."""
    if Kind.OWN not in operands:
        return Kind.FREE
    zeros = [kind is Kind.OWN for kind in operands]
    return Kind.OWN if _keeps_zeros(call, zeros) else None


def _after_sum(node: Node, operands: Sequence[Kind]) -> Kind | None:
    if Kind.OWN in operands:
        return None
    if Kind.PARTIAL not in operands:
        return Kind.FREE
    one = operands.count(Kind.PARTIAL) == 1 and len(operands) <= 2
    if is_move(node.target) or (one and node.target in FACTORS | SUMS):
        over = node.target in DIVISIONS and operands[0] is not Kind.PARTIAL
        return None if over else Kind.PARTIAL
    alike = node.target in ADDITIONS and set(operands) == {Kind.PARTIAL}
    return Kind.PARTIAL if alike and (len(operands) == 2 or node.target in JOINS) else None


def _keeps_zeros(call: Call, zeros: Sequence[bool]) -> bool:
    """Whether the result is zero wherever these operands are."""
    target = call.node.target
    if is_move(target) or target in FACTORS:
        return zeros[0] if target in DIVISIONS else any(zeros)
    if target in SUMS:
        return any(zeros) and len(zeros) <= 2
    if target in ADDITIONS:
        return all(zeros) and (len(zeros) == 2 or target in JOINS)
    if target is aten.where.self:
        return zeros[1:] == [True, True]
    if target is aten.masked_fill.Scalar:
        return zeros[0] and call["value"] == 0
    if len(zeros) == 1 and torch.Tag.pointwise in getattr(target, "tags", ()):
        return _of_zero(call.node)
    return getattr(target, "name", str)().endswith("_backward") and zeros == [True, False]


def is_move(target: object) -> bool:
    return target in MOVES or (isinstance(target, OpOverload) and target.name() in SUMS_OF_OTHERS)


def _of_zero(node: Node) -> bool:
    """Whether an operator of one tensor maps zero to zero: asked of the operator itself."""
    zero = torch.zeros((), dtype=torch.float64)
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: zero)
    result = node.target(*args, **kwargs)  # type: ignore[operator]
    return isinstance(result, torch.Tensor) and not bool(result.any())


def _trace(call: Call) -> GraphModule:
    function = call.node.target
    assert isinstance(function, OwnBackward)
    args = call.node.args
    at = [i for i, x in enumerate(args) if x in call.operands]
    values = [args[i].meta["val"].detach() for i in at]  # type: ignore[union-attr]
    incoming = [torch.empty_like(v) for v in _tensors(call.node.meta["val"])]

    def joint(*tensors: Any) -> Any:
        given = list(args)
        for i, tensor in zip(at, tensors, strict=False):
            given[i] = tensor
        results, saved = AutocastInterpreter(function.forward).run(*given)
        gradients = AutocastInterpreter(function.backward).run(*tensors[len(at) :], *saved)
        gradients = gradients if isinstance(gradients, (tuple, list)) else (gradients,)
        return _tensors(results), [gradients[i] for i in at]

    mode = detect_fake_mode(values)
    assert mode is not None, "a captured program holds fake values"
    with mode, torch.no_grad(), function.autocast.active():
        traced: Callable[..., GraphModule] = make_fx(joint, pre_dispatch=True)
        made = traced(*values, *incoming)
        try:  # a body may write into values of its own
            return functionalize(made, mode, (False,) * len(values + incoming)).graph_module
        except CaptureRefused:
            return made


def _tensors(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else [x for x in value if x is not None]


SUMS = frozenset({
    aten.sum.default, aten.sum.dim_IntList, aten.mm.default, aten.bmm.default, aten.matmul.default,
    aten.einsum.default, aten.linear.default, aten.mv.default,
})  # fmt: skip
"""Sums of products: zero for zeros, linear in each operand (but linear's third)."""

LIKE = frozenset({
    aten.view_as.default, aten.reshape_as.default, aten.expand_as.default, aten.type_as.default,
})  # fmt: skip
"""Their second operand gives a shape or a type, and no values."""

DIVISIONS = frozenset({aten.div.Tensor, aten.div.Scalar, aten.true_divide.Tensor})
FACTORS = DIVISIONS | {aten.mul.Tensor, aten.mul.Scalar}
"""Linear in each operand alone, divisions in their first."""
JOINS = frozenset({aten.cat.default, aten.stack.default})
ADDITIONS = JOINS | {aten.add.Tensor, aten.sub.Tensor}
"""Linear in all operands together."""

MOVES = frozenset({
    aten.view.default, aten.reshape.default, aten.transpose.int, aten.t.default, aten.neg.default,
    aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default,
    aten.to.dtype, aten._to_copy.default, aten.contiguous.default, aten.clone.default,
    aten.alias.default, aten.detach.default, aten.flatten.using_ints, aten.unflatten.int,
    aten.view_as.default, aten.reshape_as.default, aten.expand_as.default, aten.type_as.default,
    aten.numpy_T.default,
    aten.lift_fresh_copy.default, aten.mean.dim, aten.mean.default, aten.slice.Tensor,
    aten.select.int, aten.narrow.default, aten.chunk.default, aten.split.Tensor,
    aten.split_with_sizes.default, aten.unbind.int,
})  # fmt: skip
"""What moves elements, changes their type or averages them: linear, and zero for zeros."""
SUMS_OF_OTHERS = frozenset({"_c10d_functional::all_reduce", "_c10d_functional::wait_tensor"})
"""Sums over ranks that have the same tokens: as zero as each of them."""
