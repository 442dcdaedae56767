"""In-place operators become functional ones, so that a value never changes after it was made.

One walk copies the program. A write makes a new value (``overloads.py``); if what is written is a
view, the new value is put back into its base (``aliases.py``), and every other view of that base
that is still read is made again. New values of inputs and buffers become further results of the
program, which the runner copies into the user's tensors once the program has run.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from ringfx.errors import CaptureRefused
from ringfx.passes.capture.aliases import (
    Alias,
    can_write_back,
    same_elements,
    storage_of,
    write_back,
)
from ringfx.passes.capture.gradients import mark, needs_grad
from ringfx.passes.capture.origin import describe_node
from ringfx.passes.capture.overloads import (
    CLEARER,
    arguments_for,
    functional_overload,
    written_operands,
)
from ringfx.torch_compat.autograd import SET_GRAD_ENABLED
from ringfx.torch_compat.fake_tensors import FakeTensorMode
from ringfx.torch_compat.operators import OpOverload, schema_of

__all__ = ["Functional", "functionalize", "mutates"]

aten = torch.ops.aten
_ADVICE = "Do: use the out-of-place form (x = x + y instead of x += y)."


@dataclass(frozen=True, eq=False, kw_only=True)
class Functional:
    """A program without in-place operators."""

    graph_module: GraphModule
    writes: tuple[int, ...] = ()
    """Inputs whose new values are the last results of the program."""
    returned: Mapping[int, int] = field(default_factory=dict)
    """Results that are the written input itself: result -> input."""


def functionalize(gm: GraphModule, mode: FakeTensorMode, inputs_need: Sequence[bool]) -> Functional:
    """The same program with every write made a value.

    Raises
    ------
    CaptureRefused
        For a write whose meaning, or gradient, the functional form would not keep.
    """
    if not any(mutates(node) or node.op == "get_attr" for node in gm.graph.nodes):
        return Functional(graph_module=gm)
    return _Functionalizer(gm, mode, inputs_need).run()


def mutates(node: Node) -> bool:
    """Whether the call writes into one of its operands."""
    return isinstance(node.target, OpOverload) and schema_of(node.target).is_mutable


class _Functionalizer:
    def __init__(self, gm: GraphModule, mode: FakeTensorMode, inputs_need: Sequence[bool]) -> None:
        self.gm = gm
        self.mode = mode
        self.inputs_need = inputs_need
        self.graph = Graph()
        self.plain: dict[Node, Node] = {}
        """What stands for a value that is no tensor (a list of views, a context)."""
        self.aliases: dict[Node, Alias] = {}
        self.by_storage: dict[int, list[Alias]] = {}
        self.written: list[Alias] = []
        """Bases that were written, in the order of their first write."""
        self.grad_enabled = torch.is_grad_enabled()
        self.last_use = _last_uses(gm.graph)
        self.time = 0
        self.now: Node

    def run(self) -> Functional:
        inputs = [n for n in self.gm.graph.nodes if n.op == "placeholder"]
        need = dict(zip(inputs, self.inputs_need, strict=True))
        for time, node in enumerate(self.gm.graph.nodes):
            self.time, self.now = time, node
            if node.op == "output":
                writes, returned = self._output(node, inputs)
                break
            if mutates(node):
                self._write(node)
            else:
                self._keep(node, need.get(node, False))
        made = GraphModule(self.gm, self.graph)
        made.graph.lint()
        return Functional(graph_module=made, writes=writes, returned=returned)

    # --- values that are read -----------------------------------------------------------------

    def _current(self, node: Node) -> Node:
        alias = self.aliases.get(node)
        return self.plain[node] if alias is None else alias.current

    def _keep(self, node: Node, need: bool) -> None:
        if node.target is SET_GRAD_ENABLED:
            self.grad_enabled = bool(node.args[0])
        new = self._copy(node)
        if node.op == "placeholder":
            mark(new, need and self.grad_enabled)
        storage = storage_of(node.meta.get("val"))
        if storage is None:
            self.plain[node] = new
        else:
            self._adopt(node, new, storage)

    def _copy(self, node: Node, base: Alias | None = None) -> Node:
        """The call in the new program; where it is a view, of what ``base`` holds now."""

        def current(n: Node) -> Node:
            shares = base is not None and n in self.aliases and _shares(n, base.made_by)
            return base.current if shares and base is not None else self._current(n)

        new = self.graph.node_copy(node, current)
        mark(new, self.grad_enabled)
        return new

    def _adopt(self, node: Node, new: Node, storage: int) -> None:
        """Note a tensor and what it shares memory with."""
        known = self.by_storage.setdefault(storage, [])
        parent = self._parent(node, storage)
        if known and parent is None:
            parent = next((a for a in known if _same(a.made_by, node)), None)
        constant = node.op == "get_attr"
        if constant and parent is not None:  # x.data is traced as a constant of x's memory
            new = self.emit(aten.detach.default, parent.current)
        alias = Alias(
            current=new,
            made_by=node,
            parent=parent,
            detached=constant or node.target is aten.detach.default or not self.grad_enabled,
            last_use=self.last_use[node],
        )
        if parent is not None:
            parent.children.append(alias)
        known.append(alias)
        self.aliases[node] = alias

    def _parent(self, node: Node, storage: int) -> Alias | None:
        """The operand that a view is a view of; for a part of a split, the operand of the split."""
        sources = list(node.all_input_nodes)
        if node.target is operator.getitem and sources[0] not in self.aliases:
            sources = list(sources[0].all_input_nodes)
        for source in sources:
            if source in self.aliases and storage_of(source.meta["val"]) == storage:
                return self.aliases[source]
        return None

    # --- writes -------------------------------------------------------------------------------

    def _write(self, node: Node) -> None:
        op = node.target
        assert isinstance(op, OpOverload)
        if torch.Tag.inplace_view in op.tags:
            self._change_shape(node)
            return
        targets = written_operands(node)
        if any(t not in self.aliases for t in targets):
            self._refuse("ringfx cannot follow which tensor it writes into")
        values = self._values(node, targets)
        for target, value in zip(targets, values, strict=True):
            self._assign(self.aliases[target], self._fitted(target, value))
        self._bind_results(node, targets)

    def _values(self, node: Node, targets: list[Node]) -> list[Node]:
        """The new value of each written operand."""
        special = CLEARER.get(node.target)
        if special is not None:
            made = special(self, node)
            if made is not None:
                return [made]
        op = functional_overload(node.target)  # type: ignore[arg-type]
        if op is None:
            self._refuse("it has no functional counterpart")
        assert op is not None
        args, kwargs = arguments_for(op, node)
        args, kwargs = torch.fx.node.map_arg((args, kwargs), self._current)
        new = self.emit(op, *args, **kwargs)
        if len(schema_of(op).returns) == 1:
            return [new]
        return [self.emit(operator.getitem, new, i) for i in range(len(targets))]

    def _fitted(self, target: Node, value: Node) -> Node:
        """Of the type and shape that the written tensor has and keeps."""
        old, new = target.meta["val"], value.meta["val"]
        if new.shape != old.shape:
            self._refuse(f"it would change a shape from {tuple(old.shape)} to {tuple(new.shape)}")
        if new.dtype != old.dtype:
            return self.emit(aten.to.dtype, value, old.dtype)
        return value

    def _assign(self, alias: Alias, value: Node) -> None:
        self._check(alias)
        while alias.parent is not None:
            value = write_back(self.emit, alias, value)
            alias = alias.parent
        alias.current = value
        if alias not in self.written:
            self.written.append(alias)
        self._show(alias)

    def _check(self, alias: Alias) -> None:
        """Raise where a functional form would lose meaning."""
        root, here = alias.root, alias.made_by
        bases = [a for a in self.by_storage[storage_of(here.meta["val"])] if a.parent is None]  # type: ignore[index]
        if len(bases) > 1:
            names = ", ".join(a.made_by.name for a in bases)
            self._refuse(f"two inputs of the program share the memory it writes into ({names})")
        if root.made_by.op == "get_attr":
            self._refuse("it writes into a constant of the program")
        tracked = needs_grad(root.current)
        if tracked and not self.grad_enabled:
            self._refuse(
                "it writes without gradients into a value that has a gradient: later uses would "
                "have to pass on the gradient of the overwritten value"
            )
        while alias.parent is not None:
            if tracked and alias.detached:
                self._refuse("it writes through a detached view of a value that has a gradient")
            if not can_write_back(alias):
                self._refuse(f"it writes through {alias.made_by.target}, which has no inverse")
            alias = alias.parent

    def _show(self, alias: Alias) -> None:
        """Make the views of a new value again, if they still have readers."""
        for child in alias.children:
            if not child.needed_after(self.time):
                continue
            child.current = self._again(child)
            if child.detached and needs_grad(child.current):
                child.current = self.emit(aten.detach.default, child.current)
            self._show(child)

    def _again(self, alias: Alias) -> Node:
        assert alias.parent is not None
        made_by, base = alias.made_by, alias.parent.made_by
        if made_by.op != "call_function" or same_elements(base.meta["val"], made_by.meta["val"]):
            return alias.parent.current
        if made_by.target is operator.getitem:
            source = made_by.args[0]
            assert isinstance(source, Node)
            if source not in self.aliases:
                parts = self._copy(source, alias.parent)
                return self.emit(operator.getitem, parts, made_by.args[1])
        return self._copy(made_by, alias.parent)

    def _bind_results(self, node: Node, targets: list[Node]) -> None:
        """The results of an in-place operator are what it wrote."""
        val = node.meta.get("val")
        if isinstance(val, torch.Tensor):
            self._rename(node, self.aliases[targets[0]])
        elif val is not None and node.users:
            for user in node.users:
                assert user.target is operator.getitem, user.format_node()
            self.plain[node] = self.aliases[targets[0]].current
            self._refuse("several of its results are read")

    def _rename(self, node: Node, alias: Alias) -> None:
        self.aliases[node] = alias
        alias.last_use = max(alias.last_use, self.last_use[node])

    def _change_shape(self, node: Node) -> None:
        """x.unsqueeze_(0): from here on x is a view of what it was."""
        op = functional_overload(node.target)  # type: ignore[arg-type]
        source = node.args[0]
        if op is None or source not in self.aliases:
            self._refuse("it has no functional counterpart")
        assert op is not None
        assert isinstance(source, Node)
        old = self.aliases[source]
        if old.made_by.op == "placeholder":
            self._refuse("it changes the shape of an input")
        lies, lay = (n.meta["val"].stride() for n in (old.current, source))
        if op is aten.as_strided.default and lies != lay:  # torch's pools call it on what they made
            self._refuse(f"its strides are of memory that it does not have: {lay}, now {lies}")
        names = [n for n, a in self.aliases.items() if a is old]
        node.target = op  # the old program is not used again
        self._keep(node, False)
        for name in names:
            self._rename(name, self.aliases[node])

    # --- results ------------------------------------------------------------------------------

    def _output(self, node: Node, inputs: list[Node]) -> tuple[tuple[int, ...], Mapping[int, int]]:
        results = node.args[0]
        assert isinstance(results, (tuple, list))
        written = [a for a in self.written if a.made_by.op == "placeholder"]
        places = {id(a): inputs.index(a.made_by) for a in written}
        returned = {
            i: places[id(self.aliases[r])]
            for i, r in enumerate(results)
            if isinstance(r, Node) and id(self.aliases.get(r)) in places
        }
        values = torch.fx.node.map_arg(tuple(results), self._current)
        new = self.graph.output((*values, *(a.current for a in written)))
        new.meta = dict(node.meta)
        return tuple(places.values()), returned

    # --- emitting -----------------------------------------------------------------------------

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A call that stands where the current call of the old program stands."""
        new = self.graph.call_function(target, args, kwargs)
        new.meta = {k: v for k, v in self.now.meta.items() if k not in ("val", "tensor_meta")}
        values = torch.fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.mode, torch.no_grad():
            new.meta["val"] = target(*values[0], **values[1])
        mark(new, self.grad_enabled)
        return new

    def current(self, value: Any) -> Any:
        """An argument of the current call in the new program."""
        return self._current(value) if isinstance(value, Node) else value

    def _refuse(self, reason: str) -> None:
        raise CaptureRefused(
            f"{describe_node(self.now)}: this operator writes in place and {reason}. {_ADVICE}"
        )


def _shares(a: Node, b: Node) -> bool:
    return storage_of(a.meta["val"]) == storage_of(b.meta["val"])


def _same(a: Node, b: Node) -> bool:
    return same_elements(a.meta["val"], b.meta["val"])


def _last_uses(graph: Graph) -> dict[Node, int]:
    """When each value is last read, by itself or as what an in-place operator returned."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    last: dict[Node, int] = {}
    for node in reversed(graph.nodes):
        last[node] = max(
            (max(order[u], last[u] if mutates(u) else -1) for u in node.users), default=-1
        )
    return last
