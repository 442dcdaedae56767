"""Conversions of a value between its forms, one for each value and form, made where it was made."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from ringfx import collectives
from ringfx.passes.capture.gradients import needs_grad
from ringfx.passes.place import Carried, Placement
from ringfx.passes.place.lines import Member
from ringfx.passes.place.modes import Form
from ringfx.passes.values import Resharding

__all__ = ["Crossings"]

aten = torch.ops.aten


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
        self._made: dict[tuple[Node, Form], Node] = {}
        self._positions: list[Node] = []
        self._orders: list[Node] = []
        self._members: dict[tuple[int, Member, str], Node] = {}

    def add_line_inputs(self) -> None:
        """Placeholders for each line: this rank's positions and the order of all ranks' tokens."""
        for line in self.placement.lines.lines:
            if line.layout.world_size > 1:
                self._positions.append(self.graph.placeholder(f"positions_{line.index}"))
                self._orders.append(self.graph.placeholder(f"order_{line.index}"))

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
        if key not in self._made:
            self._made[key] = self._make(value, form, split, user)
        return self._made[key]

    def natural_of(self, value: Node) -> Node:
        """The local node that made the value."""
        return self._natural[value]

    def remember(self, value: Node, form: Form, node: Node) -> None:
        self._made[value, form] = node

    def valid(self, carried: Carried) -> Node:
        """bool [local tokens]: which local tokens are elements of the axis."""
        return self._member_node(carried, "valid")

    def own(self, carried: Carried) -> Node:
        """int64 [local tokens]: which element of the axis each local token is, if it is one."""
        return self._member_node(carried, "own")

    def report_gradients(self, bucket: Sequence[Node]) -> None:
        """The message in backward that completes the gradients of a bucket of inputs."""
        size = sum(n.meta["val"].numel() * n.meta["val"].element_size() for n in bucket)
        self._report(
            bucket[0], "all_reduce", size, f"completes the gradients of {len(bucket)} inputs"
        )

    def reduce(self, node: Node, partial: Node) -> Node:
        value = node.meta["val"]
        self._report(node, "all_reduce", value.numel() * value.element_size(), "sums over tokens")
        return self.graph.call_function(collectives.sum_partials, (partial, self.group))

    def _make(self, value: Node, form: Form, split: bool, user: Node) -> Node:
        natural = self._natural[value]
        carried = self.placement.lines.carried(value)
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
            new = self._call(value, natural, form, split, user)
        new.meta.update({k: v for k, v in natural.meta.items() if k != "val"})
        new.meta["ringfx_crossing"] = True
        return new

    def _after_inputs(self) -> Node:
        """The last of the leading placeholders and crossings."""
        after: Node = next(n for n in reversed(self.graph.nodes) if n.op == "placeholder")
        while after.next.meta.get("ringfx_crossing") or after.next.meta.get("ringfx_prologue"):
            after = after.next
        return after

    def _call(self, value: Node, natural: Node, form: Form, split: bool, user: Node) -> Node:
        if not split and form is Form.SHARED:
            return self._share(natural)
        carried = self.placement.lines.carried(value)
        assert isinstance(carried, Carried), f"{value.name} carries no token axis"
        where = self._where(carried)
        index, order = (self._member_node(carried, k) for k in ("index", "order"))
        if form is Form.SPLIT:
            return self.graph.call_function(
                collectives.slice_tokens, (natural, index, order, *where)
            )
        whole = value.meta["val"]
        reason = self.placement.reasons.get(user, "it is wanted whole")
        self._report(
            value, "gather", whole.numel() * whole.element_size(), f"{_name(user)}: {reason}"
        )
        function = collectives.gather_shared if form is Form.SHARED else collectives.gather_tokens
        valid = self._member_node(carried, "valid")
        return self.graph.call_function(function, (natural, index, order, valid, *where))

    def _share(self, natural: Node) -> Node:
        shared = self.graph.call_function(collectives.share, ([natural], self.group))
        shared.meta["ringfx_crossing"] = True
        with self.graph.inserting_after(shared):
            return self.graph.call_function(operator.getitem, (shared, 0))

    def _where(self, carried: Carried) -> tuple[Any, ...]:
        ranks = self.placement.lines.lines[carried.line].layout.world_size
        return (ranks, self.group, carried.dim, carried.outer, carried.inner)

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
                return self._prologue(aten.clamp.default, own, 0, member.length - 1)
            low = self._prologue(aten.ge.Scalar, own, 0)
        with self.graph.inserting_after(low):
            high = self._prologue(aten.lt.Scalar, own, member.length)
        with self.graph.inserting_after(high):
            return self._prologue(aten.logical_and.default, low, high)

    def _prologue(self, target: Any, *args: Any) -> Node:
        node = self.graph.call_function(target, args)
        node.meta["ringfx_prologue"] = True
        return node

    def _report(self, node: Node, kind: str, size: int, reason: str) -> None:
        self.reshardings.append(
            Resharding(
                node=node.name,
                name=node.meta.get("ringfx_path", ""),
                source=node.meta.get("ringfx_source", ""),
                kind=kind,
                bytes_moved=size,
                reason=reason,
            )
        )


def _name(node: Node) -> str:
    return str(node.target) if node.op == "call_function" else node.op
