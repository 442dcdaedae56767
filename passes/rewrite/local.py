"""Walk the global program once and emit the local one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy

from ringfx.comm import conjugate
from ringfx.comm.state_buckets import rows_of_a_part
from ringfx.comm.state_ranks import ONE_RANK, StateRanks
from ringfx.ir import tiles
from ringfx.ir.attention_spec import AttentionSpec
from ringfx.ir.layout import LayoutKind
from ringfx.ir.markers import OFFLOADED
from ringfx.ir.token_place import TokenPlace
from ringfx.ir.values import Captured, Collective
from ringfx.ops import attention
from ringfx.passes.axes.call import given_input
from ringfx.passes.capture.gradients import needs_grad
from ringfx.passes.capture.simplify import eliminate_dead
from ringfx.passes.place import PlacementMap
from ringfx.passes.rewrite.conversions import PlacementConversions, save_collectives
from ringfx.passes.rewrite.parameters import States, gather_whole, share_parameters
from ringfx.passes.rewrite.partial_gradients import of_partial_gradient
from ringfx.passes.rewrite.singular import without_padding
from ringfx.passes.split_modes import (
    LocalAttention,
    LocalCall,
    LocalGraph,
    Placement,
    SplitMode,
)
from ringfx.passes.split_modes.attention import OwnKeys
from ringfx.passes.split_modes.local_call import copied
from ringfx.passes.token_axes import TokenDim
from ringfx.passes.token_axes.axis_on_line import AxisOnLine
from ringfx.passes.token_axes.windows import along_the_line
from ringfx.strategies import SPLIT_KV, Strategy
from ringfx.strategies.keys import key_of

__all__ = ["DeferredOutput", "LocalProgram", "SplitOutput", "rewrite"]

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class SplitOutput:
    """An output that each rank holds a part of."""

    token_dim: TokenDim
    shape: tuple[int, ...]
    """Of all tokens."""


@dataclass(frozen=True, kw_only=True)
class DeferredOutput(SplitOutput):
    """An output that is computed when it is touched; the program gives None in its place."""

    body: str
    """The key of the program that computes a rank's part."""
    inputs: Mapping[int, int]
    """Operand of the body -> the input of this program that it is."""
    results: Mapping[int, int]
    """Operand of the body -> the result of this program that it is, after all outputs."""


@dataclass(frozen=True, kw_only=True)
class ReplicatedMatrices:
    """Bytes of masks and biases with an entry for each query and key that every rank has all of."""

    given: int
    """Inputs, or cut out of inputs."""
    made: int
    """Computed."""
    taken: int
    """Of both: those of which each rank takes the rows of its own queries."""


class _Produced(dict[Node, Node]):
    """Global value -> the local node that made it; sharded parameters are gathered when asked."""

    def __init__(self, local: LocalGraph, states: States) -> None:
        super().__init__()
        self._local, self._states = local, states

    def __missing__(self, value: Node) -> Node:
        if value not in self._states.rows:
            raise KeyError(value)
        self[value] = gather_whole(value, self._local, self._states)
        return self[value]


@dataclass(frozen=True, eq=False, kw_only=True)
class LocalProgram:
    """One rank's program. After the user's inputs it takes, for each line, positions and order."""

    graph_module: GraphModule
    placement: PlacementMap
    outputs: tuple[SplitOutput | None, ...]
    collectives: tuple[Collective, ...]
    group: str
    values: Mapping[Node, Node]
    """Global value -> the local node that made it."""
    attentions: Mapping[str, Node]
    """Attention's name -> its call in this program."""
    matrices: Mapping[str, ReplicatedMatrices]
    """Attention's name -> what it reads that is replicated and has an entry for each pair."""
    tokens: Mapping[Node, TokenPlace] = field(default_factory=dict)
    """Local value of which each rank has its tokens -> where they are."""
    partials: Mapping[Node, Node] = field(default_factory=dict)
    """Global sum over tokens -> the local node with this rank's part."""
    states: Mapping[int, int] = field(default_factory=dict)
    """Inputs of which a rank holds its rows -> how many, padding included."""
    bodies: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Regions in chunks, by the key of their body -> the programs of it that are run."""


def rewrite(
    captured: Captured,
    placement: PlacementMap,
    strategies: Mapping[str, Strategy],
    *,
    group: str,
    kernels: Mapping[str, str] = MappingProxyType({}),
    states: Collection[int] = (),
    state_ranks: StateRanks = ONE_RANK,
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
    states
        Inputs (parameters) of which each rank holds its rows.
    state_ranks
        The ranks that hold them.
    """
    made = States(ranks=state_ranks)
    return _Rewriter(captured, placement, strategies, group, kernels, states, made).run()


class _Rewriter:
    def __init__(
        self,
        captured: Captured,
        placement: PlacementMap,
        strategies: Mapping[str, Strategy],
        group: str,
        kernels: Mapping[str, str],
        numbers: Collection[int],
        states: States,
    ) -> None:
        self.captured = captured
        self.placement = placement
        self.strategies = strategies
        self.group = group
        self.kernels = kernels
        self.local = LocalGraph(placement.lines, group)
        self.graph = self.local.graph
        self.numbers = numbers
        self.states = states
        self.as_produced = _Produced(self.local, self.states)
        self.partial = of_partial_gradient(captured.graph_module.graph, placement)
        self.conversions = PlacementConversions(
            self.local, placement, self.as_produced, self.partial
        )
        self.attentions: dict[str, Node] = {}
        self.matrices: dict[str, ReplicatedMatrices] = {}

    def run(self) -> LocalProgram:
        nodes = list(self.captured.graph_module.graph.nodes)
        self.inputs = [n for n in nodes if n.op == "placeholder"]
        for number, node in enumerate(self.inputs):
            node.meta["ringfx_input"] = self.captured.input_names[number]
            made = self.graph.node_copy(node)
            if number in self.numbers:
                self.states.rows[node] = made
            else:
                self.as_produced[node] = made
                self._note_tokens(node)
        self.trains = any(map(needs_grad, nodes))
        self.local.add_line_inputs()
        share_parameters(self.captured, self.placement, self.conversions, self.states)
        outputs: tuple[SplitOutput | None, ...] = ()
        for node in nodes:
            if node.op == "output":
                outputs = self._output(node)
            elif node.op != "placeholder":
                self.as_produced[node] = self._emit(node)
                self._note_tokens(node)
        gm = GraphModule(self.captured.graph_module, self.graph, "RingfxLocal")
        eliminate_dead(gm.graph)
        alive = set(gm.graph.nodes)
        save_collectives(gm.graph)
        gm.graph.lint()
        gm.recompile()
        return LocalProgram(
            graph_module=gm,
            placement=self.placement,
            outputs=outputs,
            collectives=tuple(self.local.collectives),
            group=self.group,
            values={value: made for value, made in self.as_produced.items() if made in alive},
            attentions=self.attentions,
            matrices=self.matrices,
            tokens={n: place for n, place in self.local.tokens.items() if n in alive},
            states={
                i: rows_of_a_part(int(self.inputs[i].meta["val"].shape[0]), self.states.ranks.ranks)
                for i in self.numbers
            },
            partials={n: part for n, part in self.local.partials.items() if part in alive},
        )

    def _note_tokens(self, node: Node) -> None:
        tokens = self.placement.lines.token_dim(node)
        if self.placement.is_sharded(node) and isinstance(tokens, TokenDim):
            self.local.holds_tokens(self.as_produced[node], tokens)

    def _emit(self, node: Node) -> Node:
        mode = self.placement.modes.get(node)
        operands = self._operands(node, mode)
        if node.target is attention:
            new = self._attention(node, operands, mode)
        elif mode is None:
            new = copied(self.graph, node, operands)
        else:
            named = self.placement.lines.axes.ops[node]
            call = LocalCall(local=self.local, named=named, operands=operands)
            if mode.is_window:
                return mode.emit(call)  # its source's own node, which keeps its meta
            new = mode.emit(without_padding(call, mode) if self.trains else call)
        new.meta = {k: v for k, v in node.meta.items() if k != "val"} | new.meta
        return new

    def _operands(self, node: Node, mode: SplitMode | None) -> list[Node]:
        """Converted tensor operands, in the order in which the call lists them."""
        named = self.placement.lines.axes.ops.get(node)
        if named is None or mode is None:
            part = Placement.REPLICATED_PARTIAL_GRAD
            wanted = part if node in self.partial else Placement.REPLICATED
            return [self._wanted(n, wanted, node) for n in _inputs(node)]
        placements = iter(mode.operands)
        tensors = set(named.call.operands)
        return [
            self._wanted(n, next(placements) if n in tensors else Placement.REPLICATED, node)
            for n in _inputs(node)
        ]

    def _wanted(self, value: Node, placement: Placement, user: Node) -> Node:
        if value not in self.placement.lines.axes.values or _is_tuple(value):
            return self.as_produced[value]
        return self.conversions.convert(value, placement, user)

    def _attention(self, node: Node, operands: list[Node], mode: SplitMode | None) -> Node:
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
        tokens = self.placement.lines.token_dim(node)
        if isinstance(mode, LocalAttention) and isinstance(tokens, TokenDim):
            own = {x.number for x in mode.own}
            named = self.placement.lines.axes.ops[node]
            call = LocalCall(local=self.local, named=named, operands=operands)
            alone, inputs = mode.given(spec, inputs, tokens, call)
            kwargs["spec"] = alone.to_json()
        elif isinstance(mode, OwnKeys):
            kwargs |= self._over_own_keys(node, spec)
        elif mode is not None:
            own = {i for i, x in enumerate(mode.operands[3:]) if x is Placement.SHARDED}
            q_tokens = self.placement.lines.token_dim(node.args[0])  # type: ignore[arg-type]
            k_tokens = self.placement.lines.token_dim(node.args[1])  # type: ignore[arg-type]
            if isinstance(q_tokens, TokenDim) and isinstance(k_tokens, TokenDim):
                lines = self.placement.lines.lines
                layout = lines[q_tokens.line].layout.kind
                if strategy is not None and strategy.own_queries:
                    taken = self._take_rows(node, spec, own, q_tokens, inputs)
                moved = along_the_line(
                    _with_own_rows(spec, own | taken),
                    q_tokens.member.opened(q_tokens.inner),
                    k_tokens.member.opened(k_tokens.inner),
                    lines[q_tokens.line].attended(q_tokens.inner),
                    lines[k_tokens.line].attended(k_tokens.inner),
                )
                kwargs["spec"] = moved.to_json()
            kwargs |= {"group": self.group, "layout": layout}
        self.matrices[node.name] = _replicated_matrices(node, spec, own, taken)
        new = self.graph.call_function(attention, (q, k, v, inputs), kwargs)
        self.attentions[node.name] = new
        is_split = mode is not None and not isinstance(mode, LocalAttention)
        return self._with_filled_padding(node, new, v) if is_split else new

    def _over_own_keys(self, node: Node, spec: AttentionSpec) -> dict[str, Any]:
        """The arguments of few queries, of which every rank has all."""
        tokens = self.placement.lines.token_dim(node.args[1])  # type: ignore[arg-type]
        assert isinstance(tokens, TokenDim)
        line, queries = self.placement.lines.lines[tokens.line], AxisOnLine((), 0, spec.q_len)
        keys, kv_len = tokens.member.opened(tokens.inner), line.attended(tokens.inner)
        moved = along_the_line(spec, queries, keys, spec.q_len, kv_len)
        return {
            "spec": moved.to_json(), "group": self.group, "layout": line.layout.kind,
            "strategy": key_of(SPLIT_KV),
        }  # fmt: skip

    def _take_rows(
        self,
        node: Node,
        spec: AttentionSpec,
        own: Collection[int],
        queries: TokenDim,
        inputs: list[Node],
    ) -> set[int]:
        """Put this rank's rows in the place of every matrix that is replicated; which ones."""
        taken = set()
        read: Any = node.args[3]
        for i, dim in tiles.matrix_rows(*spec.functions).items():
            is_replicated = i not in own and not self.placement.is_sharded(read[i])
            if is_replicated and read[i].meta["val"].shape[dim] == spec.q_len:
                along = replace(queries, dim=dim)
                inputs[i] = self.conversions.rows(read[i], along, node)
                taken.add(i)
        return taken

    def _with_filled_padding(self, node: Node, new: Node, v: Node) -> Node:
        tokens = self.placement.lines.token_dim(node)
        if not isinstance(tokens, TokenDim) or not self.placement.is_sharded(node):
            return new
        if not self.placement.lines.lines[tokens.line].has_padding(tokens.member):
            return new
        new.meta = {k: x for k, x in node.meta.items() if k != "val"}
        valid = self.local.valid(tokens)
        if tokens.inner != 1:
            each = (valid, tokens.inner)
            valid = self.graph.call_function(aten.repeat_interleave.self_int, each)
        filled = self.graph.call_function(conjugate.fill_padding, (new, v, valid))
        if "recompute" in node.meta:  # the result itself is what is kept
            filled.meta = {"recompute": CheckpointPolicy.PREFER_RECOMPUTE, OFFLOADED: False}
        return filled

    def _output(self, node: Node) -> tuple[SplitOutput | None, ...]:
        split: list[SplitOutput | None] = []
        results: Any = node.args[0]
        given = len(results) - len(self.captured.writes)
        for value in results[:given]:
            tokens = self.placement.lines.token_dim(value) if isinstance(value, Node) else None
            if isinstance(value, Node) and self.placement.is_sharded(value):
                assert isinstance(tokens, TokenDim)
                shape = tuple(int(s) for s in value.meta["val"].shape)
                split.append(SplitOutput(token_dim=tokens, shape=shape))
            else:
                split.append(None)
        local = torch.fx.node.map_arg(tuple(results[:given]), self.as_produced.__getitem__)
        written = []
        for value, number in zip(results[given:], self.captured.writes, strict=True):
            split.append(self._arrived_alike(value, self.inputs[number]))
            # Values that are written into the user's own tensors are replicated where those are.
            alike = split[-1] is not None
            made = (
                self.as_produced[value]
                if alike
                else self._wanted(value, Placement.REPLICATED, node)
            )
            written.append(made)
        self.graph.output((*local, *written))
        return tuple(split)

    def _arrived_alike(self, value: Node, given: Node) -> SplitOutput | None:
        """How a new value of an input is sharded, if it is sharded as the input arrived."""
        lines = self.placement.lines
        tokens = lines.token_dim(given)
        if given not in lines.arrived or not self.placement.is_sharded(value):
            return None
        if not isinstance(tokens, TokenDim) or lines.token_dim(value) != tokens:
            return None
        return SplitOutput(token_dim=tokens, shape=tuple(int(s) for s in value.meta["val"].shape))


def _replicated_matrices(
    node: Node, spec: AttentionSpec, own: Collection[int], taken: Collection[int]
) -> ReplicatedMatrices:
    read: Any = node.args[3]
    replicated = set(tiles.matrices(*spec.functions)) - set(own)
    inputs = {i for i in replicated if given_input(read[i])}

    def size(numbers: Iterable[int]) -> int:
        values = [read[i].meta["val"] for i in numbers]
        return sum(v.numel() * v.element_size() for v in values)

    return ReplicatedMatrices(given=size(inputs), made=size(replicated - inputs), taken=size(taken))


def _with_own_rows(spec: AttentionSpec, local: Collection[int]) -> AttentionSpec:
    """Reads at its queries' own rows, which are sharded as they are, become reads at local rows."""
    exprs = (*spec.functions, spec.slope)
    keep, bias, score_map, slope = (tiles.of_own_rows(expr, local) for expr in exprs)
    return replace(spec, keep=keep, bias=bias, score_map=score_map, slope=slope)


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
