"""Walk the global program once and emit the local one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from ringfx.comm import conjugate
from ringfx.ir import tiles
from ringfx.ir.attention_spec import AttentionSpec
from ringfx.ir.layout import LayoutKind
from ringfx.ir.values import Captured, Resharding
from ringfx.ops import attention
from ringfx.passes.axes.call import given_input
from ringfx.passes.capture.gradients import needs_grad
from ringfx.passes.capture.simplify import eliminate_dead
from ringfx.passes.place import Placement
from ringfx.passes.place.split_modes import Form, Split
from ringfx.passes.rewrite.calls import local_call, shifted
from ringfx.passes.rewrite.crossings import Crossings, save_messages
from ringfx.passes.rewrite.parameters import share_parameters
from ringfx.passes.rewrite.singular import without_padding
from ringfx.passes.token_axes import Carried
from ringfx.passes.token_axes.windows import along_the_line
from ringfx.strategies import Strategy
from ringfx.strategies.keys import key_of

__all__ = ["LocalProgram", "SplitOutput", "rewrite"]

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class SplitOutput:
    """An output that each rank holds a part of."""

    carried: Carried
    shape: tuple[int, ...]
    """Of the whole value."""


@dataclass(frozen=True, kw_only=True)
class WholeMatrices:
    """Bytes of masks and biases with an entry for each query and key that every rank has whole."""

    given: int
    """Inputs, or cut out of inputs."""
    made: int
    """Computed."""
    taken: int
    """Of both: those of which each rank takes the rows of its own queries."""


@dataclass(frozen=True, eq=False, kw_only=True)
class LocalProgram:
    """One rank's program. After the user's inputs it takes, for each line, positions and order."""

    graph_module: GraphModule
    placement: Placement
    outputs: tuple[SplitOutput | None, ...]
    reshardings: tuple[Resharding, ...]
    group: str
    values: Mapping[Node, Node]
    """Global value -> its local node, in the form in which it was made."""
    attentions: Mapping[str, Node]
    """Attention's name -> its call in this program."""
    matrices: Mapping[str, WholeMatrices]
    """Attention's name -> what it reads that is held whole and has an entry for each pair."""


def rewrite(
    captured: Captured,
    placement: Placement,
    strategies: Mapping[str, Strategy],
    *,
    group: str,
    kernels: Mapping[str, str] = MappingProxyType({}),
) -> LocalProgram:
    """The local program.

    Parameters
    ----------
    strategies
        Canonical node name -> strategy; the program holds its key.
    group
        Name of the process group that the sequence is split over; "" for one rank.
    kernels
        Canonical node name -> the kernels that the plan counts on.
    """
    return _Rewriter(captured, placement, strategies, group, kernels).run()


class _Rewriter:
    def __init__(
        self,
        captured: Captured,
        placement: Placement,
        strategies: Mapping[str, Strategy],
        group: str,
        kernels: Mapping[str, str],
    ) -> None:
        self.captured = captured
        self.placement = placement
        self.strategies = strategies
        self.group = group
        self.kernels = kernels
        self.graph = Graph()
        self.natural: dict[Node, Node] = {}
        self.crossings = Crossings(self.graph, placement, self.natural, group)
        self.attentions: dict[str, Node] = {}
        self.matrices: dict[str, WholeMatrices] = {}

    def run(self) -> LocalProgram:
        nodes = list(self.captured.graph_module.graph.nodes)
        self.inputs = [n for n in nodes if n.op == "placeholder"]
        for node, name in zip(self.inputs, self.captured.input_names, strict=True):
            node.meta["ringfx_input"] = name
            self.natural[node] = self.graph.node_copy(node)
        self.trains = any(map(needs_grad, nodes))
        self.crossings.add_line_inputs()
        share_parameters(self.graph, self.captured, self.placement, self.crossings)
        outputs: tuple[SplitOutput | None, ...] = ()
        for node in nodes:
            if node.op == "output":
                outputs = self._output(node)
            elif node.op != "placeholder":
                self.natural[node] = self._emit(node)
        gm = GraphModule(self.captured.graph_module, self.graph, "RingfxLocal")
        eliminate_dead(gm.graph)
        alive = set(gm.graph.nodes)
        save_messages(gm.graph)
        gm.graph.lint()
        gm.recompile()
        return LocalProgram(
            graph_module=gm,
            placement=self.placement,
            outputs=outputs,
            reshardings=tuple(self.crossings.reshardings),
            group=self.group,
            values={value: made for value, made in self.natural.items() if made in alive},
            attentions=self.attentions,
            matrices=self.matrices,
        )

    def _emit(self, node: Node) -> Node:
        mode = self.placement.modes.get(node)
        operands = self._operands(node, mode)
        if mode is not None and any(mode.shifts):
            operands = shifted(self.graph, self.placement, node, mode, operands, self.crossings)
        if mode is not None and mode.identity:
            return operands[0]
        if mode is not None and self.trains:
            here = (self.graph, self.placement, node, mode)
            operands = without_padding(*here, operands, self.crossings)
        if node.target is attention:
            new = self._attention(node, operands, mode)
        else:
            new = local_call(self.graph, self.placement, node, mode, operands, self.crossings)
        new.meta = {k: v for k, v in node.meta.items() if k != "val"} | new.meta
        return new

    def _operands(self, node: Node, mode: Split | None) -> list[Node]:
        """Converted tensor operands, in the order in which the call lists them."""
        named = self.placement.lines.axes.ops.get(node)
        if named is None or mode is None:
            return [self._wanted(n, Form.WHOLE, node) for n in _inputs(node)]
        forms = iter(mode.operands)
        tensors = set(named.call.operands)
        return [
            self._wanted(n, next(forms) if n in tensors else Form.WHOLE, node)
            for n in _inputs(node)
        ]

    def _wanted(self, value: Node, form: Form, user: Node) -> Node:
        if value not in self.placement.lines.axes.values or _is_tuple(value):
            return self.natural[value]
        return self.crossings.convert(value, form, user)

    def _attention(self, node: Node, operands: list[Node], mode: Split | None) -> Node:
        q, k, v, *inputs = operands
        kwargs = dict(node.kwargs)
        strategy = self.strategies.get(node.name)
        if strategy is not None:
            kwargs["strategy"] = key_of(strategy)
        kwargs["kernels"] = self.kernels.get(node.name, "")
        layout: LayoutKind = "contiguous"
        spec = AttentionSpec.from_json(str(kwargs["spec"]))
        own: set[int] = set()
        taken: set[int] = set()
        if mode is not None:
            own = {i for i, form in enumerate(mode.operands[3:]) if form is Form.SPLIT}
            q_carried = self.placement.lines.carried(node.args[0])  # type: ignore[arg-type]
            k_carried = self.placement.lines.carried(node.args[1])  # type: ignore[arg-type]
            if isinstance(q_carried, Carried) and isinstance(k_carried, Carried):
                lines = self.placement.lines.lines
                layout = lines[q_carried.line].layout.kind
                if strategy is not None and strategy.own_queries:
                    taken = self._take_rows(node, spec, own, q_carried, inputs)
                moved = along_the_line(
                    _with_own_rows(spec, own | taken),
                    q_carried.member.opened(q_carried.inner),
                    k_carried.member.opened(k_carried.inner),
                    lines[q_carried.line].attended(q_carried.inner),
                    lines[k_carried.line].attended(k_carried.inner),
                )
                kwargs["spec"] = moved.to_json()
            kwargs |= {"group": self.group, "layout": layout}
        self.matrices[node.name] = _whole_matrices(node, spec, own, taken)
        new = self.graph.call_function(attention, (q, k, v, inputs), kwargs)
        self.attentions[node.name] = new
        return new if mode is None else self._with_filled_padding(node, new, v)

    def _take_rows(
        self,
        node: Node,
        spec: AttentionSpec,
        own: Collection[int],
        queries: Carried,
        inputs: list[Node],
    ) -> set[int]:
        """Put this rank's rows in the place of every matrix that is held whole; which ones."""
        taken = set()
        read: Any = node.args[3]
        for i, dim in tiles.matrix_rows(spec.keep, spec.bias).items():
            is_whole = i not in own and not self.placement.is_split(read[i])
            if is_whole and read[i].meta["val"].shape[dim] == spec.q_len:
                along = replace(queries, dim=dim)
                inputs[i] = self.crossings.rows(read[i], along, node)
                taken.add(i)
        return taken

    def _with_filled_padding(self, node: Node, new: Node, v: Node) -> Node:
        carried = self.placement.lines.carried(node)
        if not isinstance(carried, Carried):
            return new
        if not self.placement.lines.lines[carried.line].has_padding(carried.member):
            return new
        new.meta = {k: x for k, x in node.meta.items() if k != "val"}
        valid = self.crossings.valid(carried)
        if carried.inner != 1:
            each = (valid, carried.inner)
            valid = self.graph.call_function(aten.repeat_interleave.self_int, each)
        return self.graph.call_function(conjugate.fill_padding, (new, v, valid))

    def _output(self, node: Node) -> tuple[SplitOutput | None, ...]:
        split: list[SplitOutput | None] = []
        results: Any = node.args[0]
        given = len(results) - len(self.captured.writes)
        for value in results[:given]:
            carried = self.placement.lines.carried(value) if isinstance(value, Node) else None
            if isinstance(value, Node) and self.placement.is_split(value):
                assert isinstance(carried, Carried)
                shape = tuple(int(s) for s in value.meta["val"].shape)
                split.append(SplitOutput(carried=carried, shape=shape))
            else:
                split.append(None)
        local = torch.fx.node.map_arg(tuple(results[:given]), self.natural.__getitem__)
        written = []
        for value, number in zip(results[given:], self.captured.writes, strict=True):
            split.append(self._arrived_alike(value, self.inputs[number]))
            # What is written into the user's own tensors is whole where they are.
            alike = split[-1] is not None
            written.append(self.natural[value] if alike else self._wanted(value, Form.WHOLE, node))
        self.graph.output((*local, *written))
        return tuple(split)

    def _arrived_alike(self, value: Node, given: Node) -> SplitOutput | None:
        """How a new value of an input is split, if it is split as the input arrived."""
        lines = self.placement.lines
        carried = lines.carried(given)
        if given not in lines.arrived or not self.placement.is_split(value):
            return None
        if not isinstance(carried, Carried) or lines.carried(value) != carried:
            return None
        return SplitOutput(carried=carried, shape=tuple(int(s) for s in value.meta["val"].shape))


def _whole_matrices(
    node: Node, spec: AttentionSpec, own: Collection[int], taken: Collection[int]
) -> WholeMatrices:
    read: Any = node.args[3]
    whole = set(tiles.matrices(spec.keep, spec.bias)) - set(own)
    inputs = {i for i in whole if given_input(read[i])}

    def size(numbers: Iterable[int]) -> int:
        values = [read[i].meta["val"] for i in numbers]
        return sum(v.numel() * v.element_size() for v in values)

    return WholeMatrices(given=size(inputs), made=size(whole - inputs), taken=size(taken))


def _with_own_rows(spec: AttentionSpec, local: Collection[int]) -> AttentionSpec:
    """What it reads at its queries' own rows, and is split as they are, is read at local ones."""
    exprs = (spec.keep, spec.bias, spec.slope)
    keep, bias, slope = (tiles.of_own_rows(expr, local) for expr in exprs)
    return replace(spec, keep=keep, bias=bias, slope=slope)


def _inputs(node: Node) -> list[Node]:
    """Every node among the arguments, in the order in which torch.fx maps them, repeats kept."""
    found: list[Node] = []

    def note(n: Node) -> Node:
        found.append(n)
        return n

    torch.fx.node.map_arg((node.args, node.kwargs), note)
    return found


def _is_tuple(value: Node) -> bool:
    return isinstance(value.meta.get("val"), (tuple, list))
