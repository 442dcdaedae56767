"""Conversions of a value between its forms, one for each value and form, made where it was made."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FunctionType
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

from ringfx.comm import conjugate, halo, redistribute
from ringfx.ir.values import Resharding
from ringfx.ops import attention
from ringfx.passes.capture.gradients import needs_grad
from ringfx.passes.capture.origin import describe_node
from ringfx.passes.place import Placement
from ringfx.passes.place.split_modes import Form
from ringfx.passes.token_axes import Carried
from ringfx.passes.token_axes.axis_on_line import Member
from ringfx.passes.token_axes.find_token_lines import Tangle
from ringfx.torch_compat.autograd import SET_GRAD_ENABLED

__all__ = ["Crossings", "is_narrow", "save_messages"]

aten = torch.ops.aten
_GRADIENT = "completes a gradient"
_SENDS = frozenset(
    {
        attention, conjugate.all_gather_grad_reduce_scatter, conjugate.all_gather_grad_slice,
        conjugate.sum_partials,
        redistribute.move_tokens, halo.convolve_tokens, halo.roll_tokens, halo.shift_tokens,
    }
)  # fmt: skip


class Crossings:
    """Makes and remembers every conversion of one rewrite."""

    def __init__(
        self, graph: Graph, placement: Placement, natural: dict[Node, Node], group: str
    ) -> None:
        self.graph = graph
        self.placement = placement
        self.group = group
        self.reshardings: list[Resharding] = []
        self._natural = natural
        self._buckets: dict[Node, Callable[[], None]] = {}
        self._made: dict[tuple[Node, Form], Node] = {}
        self._rows: dict[tuple[Node, Carried], Node] = {}
        self._positions: list[Node] = []
        self._orders: list[Node] = []
        self._members: dict[tuple[int, Member, str], Node] = {}
        self._last_input: Node
        self._seen: Node
        """How far the program so far was searched for regions without gradients."""
        self._enabled = True
        self._last_enabled: Node

    def add_line_inputs(self) -> None:
        """Placeholders for each line: this rank's positions and the order of all ranks' tokens.

        One more stands for the call, see ``ringfx.comm.grad_accumulation``.
        """
        for line in self.placement.lines.lines:
            if line.layout.world_size > 1:
                self._positions.append(self.graph.placeholder(f"positions_{line.index}"))
                self._orders.append(self.graph.placeholder(f"order_{line.index}"))
        if self._positions:
            self.call = self.graph.placeholder("call")
        inputs = [n for n in self.graph.nodes if n.op == "placeholder"]
        if inputs:
            self._last_input = self._seen = self._last_enabled = inputs[-1]

    def convert(self, value: Node, form: Form, user: Node) -> Node:
        """The value in the wanted form, for a user that the plan names as the reason."""
        if form is Form.OWN:
            return self._natural[value]
        split = self.placement.is_split(value)
        if form is Form.SHARED and not needs_grad(value):
            form = Form.WHOLE
        if split == (form is Form.SPLIT) and form is not Form.SHARED:
            return self._natural[value]
        key = (value, form)
        if form is Form.SHARED and value in self._buckets and key not in self._made:
            self._buckets[value]()
        if key not in self._made:
            self._made[key] = self._make(value, form, split, user)
        return self._made[key]

    def rows(self, value: Node, along: Carried, user: Node) -> Node:
        """This rank's rows of a whole value in which one dimension is tokens, whatever its axes."""
        if (value, along) not in self._rows:
            self._rows[value, along] = self._make(value, Form.SPLIT, False, user, along)
        return self._rows[value, along]

    def natural_of(self, value: Node) -> Node:
        """The local node that made the value."""
        return self._natural[value]

    def remember(self, value: Node, form: Form, node: Node) -> None:
        self._made[value, form] = node

    def valid(self, carried: Carried) -> Node:
        """bool [local tokens]: which local tokens are elements of the axis."""
        return self._member_node(carried, "valid")

    def index(self, carried: Carried) -> Node:
        """int64 [local tokens]: the element that each local token is; where it is none, another.

        Padding goes round the axis instead of repeating its end: then it is as unlikely as real
        tokens to hold equal neighbours, whose difference a division would make NaN.
        """
        return self._member_node(carried, "index")

    def own(self, carried: Carried) -> Node:
        """int64 [local tokens]: which element of the axis each local token is, if it is one."""
        return self._member_node(carried, "own")

    def on_first_use(self, value: Node, make: Callable[[], None]) -> None:
        """``make`` remembers the shared form of a value just before the first call that needs it.

        It is called where gradients are enabled: standing in a no-grad region the conversion would
        lose the gradient of later users.
        """

        def here() -> None:
            with self._last_with_gradients():
                make()

        self._buckets[value] = here

    def _last_with_gradients(self) -> AbstractContextManager[None]:
        """The end of the program so far, or before the no-grad region that it ends in."""
        while self._seen.next.op != "root":
            self._seen = self._seen.next
            if self._seen.target is SET_GRAD_ENABLED:
                self._enabled = bool(self._seen.args[0])
            if self._enabled:
                self._last_enabled = self._seen
        if self._enabled:
            return contextlib.nullcontext()
        place: AbstractContextManager[None] = self.graph.inserting_after(self._last_enabled)
        return place

    def take(self, node: Node, whole: Node) -> Node:
        """This rank's tokens of a whole value that the call gives back as it is."""
        carried = self.placement.lines.carried(node)
        assert isinstance(carried, Carried)
        if needs_grad(node):
            self.report(node, "gather_gradient", _bytes(node), _GRADIENT, in_backward=True)
        index, order = (self._member_node(carried, kind) for kind in ("index", "order"))
        args = (whole, index, order, *self._where(carried, node))
        return self.graph.call_function(conjugate.slice_tokens, args)

    def reduce(self, node: Node, partial: Node) -> Node:
        """The sum of all ranks' parts, in the type that the value has."""
        if is_narrow(node):
            partial = self.graph.call_function(aten.to.dtype, (partial, torch.float32))
        return self.narrowed(node, self.total(node, partial))

    def total(self, node: Node, partial: Node) -> Node:
        """The sum; of float16 and bfloat16 in float32, as an operator sums that has them all."""
        size = _bytes(node) * (2 if is_narrow(node) else 1)
        self.report(node, "all_reduce", size, "sums over tokens")
        args = (partial, self.group, _words(node))
        return self.graph.call_function(conjugate.sum_partials, args)

    def narrowed(self, node: Node, total: Node) -> Node:
        if not is_narrow(node):
            return total
        return self.graph.call_function(aten.to.dtype, (total, node.meta["val"].dtype))

    def _make(
        self, value: Node, form: Form, split: bool, user: Node, along: Carried | None = None
    ) -> Node:
        natural = self._natural[value]
        carried = along or self.placement.lines.carried(value)
        if split or form is Form.SPLIT:
            assert isinstance(carried, Carried), f"{value.name} carries no token axis"
            for kind in ("index", "order", "valid"):  # made before the insertion point is sought
                self._member_node(carried, kind)
        after = natural
        while after.next.meta.get("ringfx_crossing"):
            after = after.next
        if natural.op == "placeholder":
            after = self._after_inputs()
        with self.graph.inserting_after(after):
            new = self._call(value, natural, form, split, user, carried)
        new.meta.update({k: v for k, v in natural.meta.items() if k != "val"})
        new.meta["ringfx_crossing"] = True
        return new

    def _after_inputs(self) -> Node:
        """The last of the leading placeholders and crossings."""
        after = self._last_input
        while after.next.meta.get("ringfx_crossing") or after.next.meta.get("ringfx_prologue"):
            after = after.next
        return after

    def _call(
        self,
        value: Node,
        natural: Node,
        form: Form,
        split: bool,
        user: Node,
        carried: Carried | Tangle | None,
    ) -> Node:
        if not split and form is Form.SHARED:
            self.report(value, "all_reduce", _bytes(value), _GRADIENT, in_backward=True)
            args: tuple[Any, ...] = (natural, self.group, _words(value))
            return self.graph.call_function(conjugate.identity_grad_all_reduce, args)
        assert isinstance(carried, Carried), f"{value.name} carries no token axis"
        where = self._where(carried, value)
        index, order, valid = (self._member_node(carried, k) for k in ("index", "order", "valid"))
        if form is Form.SPLIT:
            if needs_grad(value):
                self.report(value, "gather_gradient", _bytes(value), _GRADIENT, in_backward=True)
            args = (natural, index, order, *where)
            return self.graph.call_function(conjugate.slice_tokens, args)
        reason = self.placement.reasons.get(user, "it is wanted whole")
        self.report(value, "gather", _bytes(value), f"{_name(user)}: {reason}")
        if form is Form.SHARED:
            size = _bytes(value) // where[0]
            self.report(value, "reduce_scatter", size, _GRADIENT, in_backward=True)
            args = (natural, order, *where)
            return self.graph.call_function(conjugate.all_gather_grad_reduce_scatter, args)
        args = (natural, index, order, valid, *where)
        return self.graph.call_function(conjugate.all_gather_grad_slice, args)

    def _where(self, carried: Carried, value: Node) -> tuple[Any, ...]:
        ranks = self.placement.lines.lines[carried.line].layout.world_size
        return (ranks, self.group, carried.dim, carried.outer, carried.inner, _words(value))

    def _member_node(self, carried: Carried, kind: str) -> Node:
        key = (carried.line, carried.member, kind)
        if key not in self._members:
            after = self._after_inputs()
            with self.graph.inserting_after(after):
                self._members[key] = self._member_call(carried, kind)
        return self._members[key]

    def _member_call(self, carried: Carried, kind: str) -> Node:
        """Indices of a member, from the line's positions and order."""
        positions, order = self._positions[carried.line], self._orders[carried.line]
        member = carried.member
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

    def report(
        self, node: Node, kind: str, size: int, reason: str, *, in_backward: bool = False
    ) -> None:
        """Say in the plan that one message is sent."""
        self.reshardings.append(
            Resharding(
                node=node.name,
                name=node.meta.get("ringfx_path", "") or node.meta.get("ringfx_input", ""),
                source=node.meta.get("ringfx_source", ""),
                kind=kind,
                bytes_moved=size,
                reason=reason,
                in_backward=in_backward,
            )
        )


def save_messages(graph: Graph) -> None:
    """In checkpointed regions what was sent is saved: a recompute must not send it again."""
    for node in graph.nodes:
        if "recompute" in node.meta and node.target in _SENDS:
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def is_narrow(node: Node) -> bool:
    """Whether a value's type is one in which sums lose digits, or overflow."""
    return node.meta["val"].dtype in (torch.float16, torch.bfloat16)


def _bytes(node: Node) -> int:
    value = node.meta["val"]
    return int(value.numel() * value.element_size())


def _name(node: Node) -> str:
    if isinstance(node.target, FunctionType):
        return f"ringfx.{node.target.__name__}"
    return str(node.target) if node.op == "call_function" else node.op


def _words(node: Node) -> str:
    """What a message carries, for an error: ``lm_head (model.py:61), aten.linear.default``."""
    if node.op != "placeholder":
        return describe_node(node)
    return f"input {node.meta.get('ringfx_input', node.name)}"
