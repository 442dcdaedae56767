"""The minimum cut that decides which values are whole and which are split."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import networkx as nx
import torch
from torch.fx import Node

from ringfx.comm.redistribute import relay
from ringfx.ops import attention
from ringfx.passes.axes.call import Share, result_values
from ringfx.passes.axes.space import Dim
from ringfx.passes.capture.gradients import needs_grad
from ringfx.passes.place.repeated_layers import alike
from ringfx.passes.place.split_modes import Form, Split, Unsplittable, split_mode
from ringfx.passes.token_axes.find_token_lines import Carried, Lines

__all__ = ["Placement", "place"]

WHOLE, SPLIT = "whole", "split"
COMMUNICATION = 8
"""Cost of a byte between ranks, in bytes of memory traffic: links are about this much slower than
memory (NVLink 450 GB/s against HBM 3.3 TB/s on H100, vendor data sheets)."""
FLOPS_PER_BYTE = 100
"""Floating-point operations that take as long as a byte of memory traffic (same data sheets)."""

OTHERWISE = Unsplittable("it runs split along other tokens")


@dataclass(frozen=True, eq=False, kw_only=True)
class Placement:
    """Which calls run split, and how; everything else is whole."""

    lines: Lines
    modes: Mapping[Node, Split]
    """Calls that run on split tokens."""
    reasons: Mapping[Node, str]
    """For calls that touch tokens and run whole: why."""

    def is_split(self, node: Node, index: int = 0) -> bool:
        """Whether the value lives split: its call runs split and its result carries a line."""
        if node.target is operator.getitem:
            source, place = node.args
            assert isinstance(source, Node)
            assert isinstance(place, int)
            return self.is_split(source, place)
        mode = self.modes.get(node)
        carried = self.lines.carried(node, index)
        return mode is not None and not mode.partial and isinstance(carried, Carried)


def place(graph: torch.fx.Graph, lines: Lines) -> Placement:
    """The cheapest legal placement, one cut for each token line."""
    modes: dict[Node, Split] = {}
    reasons: dict[Node, str] = {}
    for line in lines.lines:
        if line.layout.world_size == 1:
            continue
        wanted = {
            n: OTHERWISE if n in modes and not lines.axes.ops[n].axes.together else m
            for n in graph.nodes
            if (m := split_mode(lines, n, line.index)) is not None
        }
        chosen = _cut(graph, lines, line.index, wanted)
        for node, mode in wanted.items():
            if isinstance(mode, Unsplittable):
                reasons.setdefault(node, mode.reason)
            elif node in chosen:
                modes[node] = _merge(modes.get(node), mode)
            else:
                reasons.setdefault(node, "running it whole moves less")
    return Placement(lines=lines, modes=modes, reasons=reasons)


def _merge(old: Split | None, new: Split) -> Split:
    """Attention from one line to another takes each operand as its line says."""
    if old is None:
        return new
    operands = tuple(
        Form.SPLIT if Form.SPLIT in pair else pair[0]
        for pair in zip(old.operands, new.operands, strict=True)
    )
    return Split(operands=operands, partial=old.partial or new.partial, identity=False)


def _cut(
    graph: torch.fx.Graph, lines: Lines, line: int, modes: Mapping[Node, Split | Unsplittable]
) -> set[Node]:
    """The calls on the split side."""
    ranks = lines.lines[line].layout.world_size
    savings = {
        n: 0 if n in lines.arrived or _is_free(m) else _savings(lines, n, line, ranks)
        for n, m in modes.items()
        if isinstance(m, Split)
    }
    vertex = alike(graph, lambda n: (modes.get(n), savings.get(n), _bytes(n)))
    network = nx.DiGraph()
    network.add_nodes_from((WHOLE, SPLIT))
    connect = _connector(network)
    for node, mode in modes.items():
        if isinstance(mode, Unsplittable):
            connect(WHOLE, vertex[node], None)
            continue
        if node.target is attention or node in lines.arrived or _starts(lines, node, line):
            connect(vertex[node], SPLIT, None)
        connect(vertex[node], SPLIT, max(savings[node], 0) + 1)
        connect(WHOLE, vertex[node], max(-savings[node], 0))
        if mode.partial:
            connect(WHOLE, vertex[node], COMMUNICATION * _bytes(node) + 1)
    for node in graph.nodes:
        _connect_uses(connect, vertex, lines, line, node, modes)
    for together in _tied(lines, line, modes):
        for one, other in pairwise((*together, together[0])):
            connect(vertex[one], vertex[other], None)
    _, (_, split_side) = nx.minimum_cut(network, WHOLE, SPLIT)
    return {n for n in modes if vertex[n] in split_side}


def _starts(lines: Lines, node: Node, line: int) -> bool:
    """Whether it is a relay to the line: what it gives is split, and may be gathered again."""
    carried = lines.carried(node) if node.target is relay else None
    return isinstance(carried, Carried) and carried.line == line


def _is_free(mode: Split) -> bool:
    """Whether nothing is computed: the value is stored as another one already."""
    return mode.identity and not any(mode.shifts)


def _savings(lines: Lines, node: Node, line: int, ranks: int) -> int:
    """What a rank saves when the call runs split, in bytes of memory traffic.

    A relay sends 1/p of the tokens forwards and backwards, where one of a whole value gathers its
    whole gradient.
    """
    if node.target is relay:
        backward = 1 if needs_grad(node) else 0
        return int(COMMUNICATION * _bytes(node) * (backward - (1 + backward) / ranks))
    return int(_work(lines, node) * (1 - _stored(lines, node, line) / ranks))


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


def _connect_uses(
    connect: Connect,
    names: Mapping[Node, str],
    lines: Lines,
    line: int,
    value: Node,
    modes: Mapping[Node, Split | Unsplittable],
) -> None:
    """Edges for a value's transfers: gathered if split and wanted whole, sliced the other way."""
    carried = lines.carried(value)
    if not isinstance(carried, Carried) or carried.line != line:
        return
    maker = value.all_input_nodes[0] if value.target is operator.getitem else value
    made = modes.get(maker)
    stays = isinstance(made, Split) and not made.partial
    vertex = names[maker] if stays or isinstance(made, Unsplittable) else WHOLE
    gather, cut = f"gather {names[value]}", f"slice {names[value]}"
    fixed = carried.member.is_sorted
    moved = COMMUNICATION * _bytes(value)
    for user in value.users:
        if user.op == "output" or user.target is operator.getitem:
            continue
        form = _wanted(lines, value, user, modes.get(user))
        if form is Form.OWN:
            continue
        if form is Form.SPLIT:
            connect(cut, names[user], None)
            connect(vertex, cut, None if fixed else moved + 1 if needs_grad(value) else 1)
            connect(names[user], gather, None)
        else:
            connect(WHOLE, gather, None)
        if vertex != WHOLE:
            connect(gather, vertex, None if fixed else moved + 1)


def _wanted(lines: Lines, value: Node, user: Node, mode: Split | Unsplittable | None) -> Form:
    """The form in which a user that runs split takes the value."""
    if not isinstance(mode, Split):
        return Form.WHOLE
    operands = lines.axes.ops[user].call.operands
    forms = [f for n, f in zip(operands, mode.operands, strict=True) if n is value]
    taken = set(forms) - {Form.OWN} if len(set(forms)) > 1 else set(forms)
    return taken.pop() if len(taken) == 1 and taken <= {Form.SPLIT, Form.OWN} else Form.WHOLE


def _tied(
    lines: Lines, line: int, modes: Mapping[Node, Split | Unsplittable]
) -> Iterator[list[Node]]:
    """Calls that share an order of rows: all ranks' or each rank's own, for all of them."""
    axes = lines.axes
    for route in lines.routes:
        ordered = axes.space.resolve(route.ordered)
        together = [n for n in modes if n in route.nodes or _takes(lines, n, ordered)]
        if together and any(m.axis == ordered for m in lines.lines[line].members):
            yield together


def _takes(lines: Lines, node: Node, axis: Dim) -> bool:
    """Whether a call has an operand with the axis."""
    named = lines.axes.ops.get(node)
    return named is not None and any(axis in lines.axes.dims(n) for n in named.call.operands)


def _stored(lines: Lines, node: Node, line: int) -> float:
    """How much longer the line is than what the call has of it: split, a window is as long."""
    values = [(n, 0) for n in lines.axes.ops[node].call.operands]
    values += [(node, i) for i in range(len(result_values(node)))]
    places = [lines.carried(*value) for value in values]
    lengths = [c.member.length for c in places if isinstance(c, Carried) and c.line == line]
    return lines.lines[line].length / max(lengths, default=1)


def _bytes(node: Node) -> int:
    return sum(v.numel() * v.element_size() for v in result_values(node))


def _work(lines: Lines, node: Node) -> int:
    """Bytes written, and operations of contractions as bytes; doubled where a backward runs."""
    named = lines.axes.ops[node]
    contracted = 1
    for label, share in named.axes.share.items():
        if share is Share.SUM and named.axes.results and len(named.call.operands) > 1:
            contracted *= lines.axes.space.size(lines.axes.label(node, label))
    elements = sum(v.numel() for v in result_values(node))
    operations = 2 * elements * contracted if contracted > 1 else 0
    return (_bytes(node) + operations // FLOPS_PER_BYTE) * (2 if needs_grad(node) else 1)
