"""The minimum cut that decides which values are replicated and which are sharded."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import networkx as nx
import torch
from torch.fx import Node

from ringfx.ops import attention
from ringfx.passes.axes import how
from ringfx.passes.axes.call import result_values
from ringfx.passes.axes.space import Dim
from ringfx.passes.capture.gradients import needs_grad
from ringfx.passes.place.repeated_layers import alike
from ringfx.passes.split_modes import CannotSplit, Placement, SplitMode, split_mode
from ringfx.passes.token_axes.row_maps import columns_of_rows, is_product
from ringfx.passes.token_axes.token_line import Lines, TokenDim
from ringfx.passes.token_axes.work import COMMUNICATION, bytes_of, work_of

__all__ = ["PlacementMap", "home_device", "place"]

REPLICATED, SHARDED = "replicated", "sharded"
WITHOUT_ATTENTION = 4 * COMMUNICATION
"""How often a byte counts that a rank need not have, where no attention obliges any value to be
sharded: memory is what the split is for, and a small model would be replicated for its speed."""

OTHER_AXIS = CannotSplit("it is sharded along another token axis")
ELSEWHERE = CannotSplit("it reads a tensor that is on another device")
DEARER = "replicating it is cheaper than resharding"


@dataclass(frozen=True, eq=False, kw_only=True)
class PlacementMap:
    """Which calls run on sharded tokens, and how; everything else is replicated."""

    lines: Lines
    modes: Mapping[Node, SplitMode]
    """Calls that run on sharded tokens."""
    reasons: Mapping[Node, str]
    """For calls that touch tokens and are replicated: why."""
    device: torch.device
    """Of its sharded values."""

    def is_sharded(self, node: Node, index: int = 0) -> bool:
        """Whether each rank holds its tokens of the value."""
        if node.target is operator.getitem:
            source, place = node.args
            assert isinstance(source, Node)
            assert isinstance(place, int)
            return self.is_sharded(source, place)
        mode = self.modes.get(node)
        tokens = self.lines.token_dim(node, index)
        return mode is not None and not mode.is_partial_sum and isinstance(tokens, TokenDim)


@dataclass(frozen=True, eq=False, kw_only=True)
class _OnLine:
    """The calls that touch one token line, and what each may do along it."""

    graph: torch.fx.Graph
    lines: Lines
    line: int
    modes: Mapping[Node, SplitMode | CannotSplit]
    columns: frozenset[Dim]
    """Axes of tokens of which each row reads all."""

    @property
    def ranks(self) -> int:
        return self.lines.lines[self.line].layout.world_size


def place(graph: torch.fx.Graph, lines: Lines) -> PlacementMap:
    """The cheapest legal placement, one cut for each token line."""
    modes: dict[Node, SplitMode] = {}
    reasons: dict[Node, str] = {}
    home = home_device(value for node in graph.nodes for value in result_values(node))
    elsewhere = _reading_elsewhere(graph, home)
    columns = columns_of_rows(graph, lines.axes)
    for line in lines.lines:
        if line.layout.world_size == 1:
            continue
        possible = {
            n: _barred(n, n in modes and not _moves_tokens(lines, n), elsewhere) or m
            for n in graph.nodes
            if (m := split_mode(lines, n, line.index)) is not None
        }
        on = _OnLine(
            graph=graph, lines=lines, line=line.index, modes=possible, columns=columns
        )  # fmt: skip
        chosen = _cut(on)
        for node, mode in possible.items():
            if isinstance(mode, CannotSplit):
                reasons.setdefault(node, mode.reason)
            elif node in chosen:
                modes[node] = modes[node].merged(mode) if node in modes else mode
            else:
                reasons.setdefault(node, DEARER)
    return PlacementMap(lines=lines, modes=modes, reasons=reasons, device=home)


def _barred(node: Node, on_other_axis: bool, elsewhere: set[Node]) -> CannotSplit | None:
    if node in elsewhere:
        return ELSEWHERE
    return OTHER_AXIS if on_other_axis else None


def home_device(values: Iterable[object]) -> torch.device:
    """The device of most tensors among the values; a number may be anywhere."""
    devices = Counter(v.device for v in values if isinstance(v, torch.Tensor) and v.dim())
    return max(devices, key=lambda device: devices[device], default=torch.device("cpu"))


def _reading_elsewhere(graph: torch.fx.Graph, home: torch.device) -> set[Node]:
    """Calls on a tensor that cannot be sharded: its tokens are picked by tensors at home.

    A model may keep a table on the CPU and move it when it is called; it is moved whole.
    """
    away = {
        node for node in graph.nodes
        if any(value.dim() and value.device != home for value in result_values(node))
    }  # fmt: skip
    return {node for node in graph.nodes if away.intersection(node.all_input_nodes)}


def _moves_tokens(lines: Lines, node: Node) -> bool:
    """Whether the call itself takes tokens from one line to another."""
    return isinstance(lines.axes.ops[node].axes.how, how.Attend | how.Reshard)


def _cut(on: _OnLine) -> set[Node]:
    """The calls on the sharded side."""
    savings = {
        n: 0 if n in on.lines.arrived or m.is_free else _savings(on, n)
        for n, m in on.modes.items()
        if isinstance(m, SplitMode)
    }
    vertex = alike(on.graph, lambda n: (on.modes.get(n), savings.get(n), bytes_of(n)))
    network = nx.DiGraph()
    network.add_nodes_from((REPLICATED, SHARDED))
    connect = _connector(network)
    for node, mode in on.modes.items():
        if isinstance(mode, CannotSplit):
            connect(REPLICATED, vertex[node], None)
            continue
        is_attention = node.target is attention or _reads_every_token(on, node)
        if is_attention or node in on.lines.arrived or _starts(on, node):
            connect(vertex[node], SHARDED, None)
        connect(vertex[node], SHARDED, max(savings[node], 0) + 1)
        connect(REPLICATED, vertex[node], max(-savings[node], 0))
        if mode.is_partial_sum:
            connect(REPLICATED, vertex[node], COMMUNICATION * bytes_of(node) + 1)
    for node in on.graph.nodes:
        _connect_uses(connect, vertex, on, node)
    for together in _tied(on):
        for one, other in pairwise((*together, together[0])):
            connect(vertex[one], vertex[other], None)
    _, (_, sharded_side) = nx.minimum_cut(network, REPLICATED, SHARDED)
    return {n for n in on.modes if vertex[n] in sharded_side}


def _is_reshard(lines: Lines, node: Node) -> bool:
    named = lines.axes.ops.get(node)
    return named is not None and isinstance(named.axes.how, how.Reshard)


def _starts(on: _OnLine, node: Node) -> bool:
    """Whether it is a reshard to the line: its result is sharded, and may be gathered again."""
    tokens = on.lines.token_dim(node) if _is_reshard(on.lines, node) else None
    return isinstance(tokens, TokenDim) and tokens.line == on.line


def _reads_every_token(on: _OnLine, node: Node) -> bool:
    """Whether it is a product of a rank's own rows with all tokens: scores, or weights of values.

    It is split wherever it can be, as attention is.
    """
    axes = on.lines.axes
    if not (on.columns and is_product(axes, node)):
        return False
    return any(on.columns.intersection(axes.dims(n)) for n in axes.ops[node].call.operands)


def _savings(on: _OnLine, node: Node) -> int:
    """What a rank saves when the call runs on sharded tokens, in bytes of memory traffic.

    A reshard sends 1/p of the tokens forwards and backwards, where one of a replicated value
    gathers all of its gradient.
    """
    if _is_reshard(on.lines, node):
        backward = 1 if needs_grad(node) else 0
        return int(COMMUNICATION * bytes_of(node) * (backward - (1 + backward) / on.ranks))
    weight = WITHOUT_ATTENTION if on.lines.inputs else 1
    return int(weight * work_of(on.lines.axes, node) * (1 - _stored(on, node) / on.ranks))


Connect = Callable[[str, str, int | None], None]


def _connector(network: nx.DiGraph) -> Connect:
    """Adds capacity between two vertices; None is infinite."""

    def connect(source: str, target: str, capacity: int | None) -> None:
        if capacity is None:
            network.add_edge(source, target)
        elif network.has_edge(source, target):
            old = network[source][target].get("capacity")
            if old is not None:
                network[source][target]["capacity"] = old + capacity
        else:
            network.add_edge(source, target, capacity=capacity)

    return connect


def _connect_uses(connect: Connect, names: Mapping[Node, str], on: _OnLine, value: Node) -> None:
    """Edges for a value's transfers: gathered if sharded and wanted replicated, sliced back."""
    tokens = on.lines.token_dim(value)
    if not isinstance(tokens, TokenDim) or tokens.line != on.line:
        return
    maker = value.all_input_nodes[0] if value.target is operator.getitem else value
    made = on.modes.get(maker)
    stays = isinstance(made, SplitMode) and not made.is_partial_sum
    vertex = names[maker] if stays or isinstance(made, CannotSplit) else REPLICATED
    gather, cut = f"gather {names[value]}", f"slice {names[value]}"
    fixed = tokens.member.is_sorted
    moved = COMMUNICATION * bytes_of(value)
    for user in value.users:
        if user.op == "output" or user.target is operator.getitem:
            continue
        wanted = _wanted(on, value, user)
        if wanted is Placement.RANK_LOCAL:
            continue
        if wanted is Placement.SHARDED:
            connect(cut, names[user], None)
            connect(vertex, cut, None if fixed else moved + 1 if needs_grad(value) else 1)
            connect(names[user], gather, None)
        else:
            connect(REPLICATED, gather, None)
        if vertex != REPLICATED:
            connect(gather, vertex, None if fixed else moved + 1)


def _wanted(on: _OnLine, value: Node, user: Node) -> Placement:
    """The placement in which a user that runs on sharded tokens takes the value."""
    mode = on.modes.get(user)
    if not isinstance(mode, SplitMode):
        return Placement.REPLICATED
    operands = on.lines.axes.ops[user].call.operands
    found = {p for n, p in zip(operands, mode.operands, strict=True) if n is value}
    taken = found - {Placement.RANK_LOCAL} if len(found) > 1 else found
    if len(taken) == 1 and taken <= {Placement.SHARDED, Placement.RANK_LOCAL}:
        return taken.pop()
    return Placement.REPLICATED


def _tied(on: _OnLine) -> Iterator[list[Node]]:
    """Calls that share an order of rows: all ranks' or each rank's own, for all of them."""
    axes = on.lines.axes
    members = {m.axis for m in on.lines.lines[on.line].members}
    for route in on.lines.routes:
        ordered = axes.space.resolve(route.ordered)
        together = [n for n in on.modes if n in route.nodes or _takes(on.lines, n, ordered)]
        if together and ordered in members:
            yield together


def _takes(lines: Lines, node: Node, axis: Dim) -> bool:
    """Whether a call has an operand with the axis."""
    named = lines.axes.ops.get(node)
    return named is not None and any(axis in lines.axes.dims(n) for n in named.call.operands)


def _stored(on: _OnLine, node: Node) -> float:
    """How much longer the line is than what the call has of it: sharded, a window is as long."""
    values = [(n, 0) for n in on.lines.axes.ops[node].call.operands]
    values += [(node, i) for i in range(len(result_values(node)))]
    places = [on.lines.token_dim(*value) for value in values]
    lengths = [x.member.length for x in places if isinstance(x, TokenDim) and x.line == on.line]
    return on.lines.lines[on.line].length / max(lengths, default=1)
