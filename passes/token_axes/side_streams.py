"""Streams beside a longer line that are better sharded as lines of their own.

Text tokens and image tokens are joined for one attention and cut apart after it. Sharded as a part
of the joined line, each rank computes as many rows of text as the whole line has: 576 of 4,608 for
512 tokens of text on 8 ranks, which is all of it. As a line of their own each rank has 64, and they
are exchanged where they are joined and where they are cut out. For a stream of W work, and of what
its calls keep for backward:

    along the line   W rows(line) / length
    on every rank    W + COMMUNICATION gathered, and completed gradients
    its own line     W rows(own) / length + COMMUNICATION exchanged, forwards and backwards

The exchange is counted as the rank has it that sends or receives most: joined text may lie on one
rank alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import networkx as nx
import torch
from torch.fx import Graph, Node

from ringfx.comm.redistribute import reshard
from ringfx.ir.layout import Layout
from ringfx.passes.axes.call import result_values
from ringfx.passes.axes.rules.views import RULES as VIEWS
from ringfx.passes.axes.space import Dim
from ringfx.passes.capture.gradients import needs_grad
from ringfx.passes.token_axes.axis_on_line import AxisOnLine
from ringfx.passes.token_axes.token_line import Lines, TokenDim, TokenLine
from ringfx.passes.token_axes.work import COMMUNICATION, bytes_of, work_of

__all__ = ["side_streams"]

aten = torch.ops.aten
NEARLY = 1.5
"""A stream that is not much shorter than its line stays: what a rank has of it falls as it is."""
KEPT = COMMUNICATION
"""How often a byte counts that a rank keeps for backward: memory is what the split is for, and
narrow streams would be replicated for their speed."""


@dataclass(frozen=True, kw_only=True)
class _Link:
    """Where a stream is joined to others, or cut out of them."""

    node: Node
    value: Node
    """The piece that is joined, or what it is cut out of."""
    others: Dim

    @property
    def moved(self) -> Node:
        """What is exchanged there."""
        return self.value if self.is_join else self.node

    @property
    def is_join(self) -> bool:
        return self.node.target is aten.cat.default


def side_streams(graph: Graph, lines: Lines) -> frozenset[tuple[Node, Node]]:
    """Calls and operands between which a stream goes from its own line to a longer, or back."""
    axes = lines.axes
    links: dict[Dim, list[_Link]] = defaultdict(list)
    related = nx.Graph()
    fixed = set[Dim]()
    for node, value, one, other in _windows(graph, lines):
        related.add_edge(one, other)
        if not _is_plain(lines, node, value):
            fixed |= {one, other}
        links[one].append(_Link(node=node, value=value, others=other))
        links[other].append(_Link(node=node, value=value, others=one))
    arrived = {axis for n in lines.arrived for axis in axes.dims(n)}
    candidates = {
        m.axis: line
        for line in lines.lines
        for m in line.members[1:]
        if m.axis in links and m.axis not in fixed | arrived and _wastes(line, m)
    }
    work = _work(lines, candidates) if candidates else {}
    found = set[tuple[Node, Node]]()
    for axis, line in candidates.items():
        member, whole = line.member(axis), line.members[0].axis
        assert member is not None
        others = related.copy()
        others.remove_node(axis)
        far = nx.node_connected_component(others, whole) if whole in others else {whole}
        crossed = [x for x in links[axis] if x.others in far]
        if crossed and _is_cheaper(line, member, work.get(axis, 0), crossed):
            found |= {(x.node, x.value) for x in crossed}
    return frozenset(found)


def _windows(graph: Graph, lines: Lines) -> Iterator[tuple[Node, Node, Dim, Dim]]:
    """For each slice and each piece of a concatenation: the call, what it is given, both axes."""
    resolve = lines.axes.space.resolve
    pieces: dict[Node, int] = defaultdict(int)
    for window in lines.axes.windows:
        operands = lines.axes.ops[window.node].call.operands
        one, other = resolve(window.source), resolve(window.result)
        number = pieces[window.node]
        pieces[window.node] += 1
        is_join = window.node.target is aten.cat.default
        value = _pieces(window.node, operands)[number] if is_join else operands[0]
        if one and other and one != other:
            yield window.node, value, one, other


def _pieces(node: Node, operands: tuple[Node, ...]) -> list[Node]:
    """Those of a concatenation that are longer than one token, which are windows of it."""
    dim = node.args[1] if len(node.args) > 1 else 0
    assert isinstance(dim, int)
    return [n for n in operands if int(n.meta["val"].shape[dim]) > 1]


def _is_plain(lines: Lines, node: Node, value: Node) -> bool:
    """Whether it is a slice or a concatenation of tokens alone."""
    if node.target not in (aten.cat.default, aten.slice.Tensor):
        return False
    places = (lines.token_dim(node), lines.token_dim(value))
    return all(isinstance(x, TokenDim) and _is_alone(x) for x in places)


def _is_alone(place: TokenDim) -> bool:
    return place.outer * place.inner == 1 and not place.member.is_sorted


def _wastes(line: TokenLine, member: AxisOnLine) -> bool:
    ranks = line.layout.world_size
    return ranks > 1 and line.layout.local_length > NEARLY * _own(line, member).local_length


def _own(line: TokenLine, member: AxisOnLine) -> Layout:
    return Layout("contiguous", member.length, line.layout.world_size)


def _work(lines: Lines, streams: Mapping[Dim, TokenLine]) -> Mapping[Dim, int]:
    """Of all calls along each stream, what they keep counted higher."""
    found: dict[Dim, int] = defaultdict(int)
    for node in lines.axes.ops:
        if node.target in VIEWS or node.target is reshard:
            continue
        kept = (KEPT - 1) * bytes_of(node) if needs_grad(node) else 0
        places = [lines.token_dim(node, i) for i in range(len(result_values(node)))]
        axes = {x.member.axis for x in places if isinstance(x, TokenDim)}
        for axis in axes & streams.keys():
            found[axis] += work_of(lines.axes, node) + kept
    return found


def _is_cheaper(line: TokenLine, member: AxisOnLine, work: int, links: list[_Link]) -> bool:
    own = _own(line, member)
    exchanged = _exchanged(line.layout, member, own) / member.length
    moved = {x.moved: x for x in links}
    both_ways = sum(bytes_of(n) * (2 if needs_grad(n) else 1) for n in moved)
    gathered = sum(
        bytes_of(n) for n, x in moved.items() if not x.is_join or needs_grad(n)
    ) * (1 - 1 / own.world_size)  # fmt: skip
    apart = work * own.local_length / member.length + COMMUNICATION * both_ways * exchanged
    along = work * line.layout.local_length / member.length
    return apart < min(along, work + COMMUNICATION * gathered)


def _exchanged(layout: Layout, member: AxisOnLine, own: Layout) -> int:
    """Tokens that the rank sends or receives that does so most."""
    most = 0
    for rank in range(own.world_size):
        (mine,) = _runs(own, rank, 0, member.length)
        runs = list(_runs(layout, rank, member.offset, member.length))
        kept = sum(_shared(mine, run) for run in runs)
        stored = sum(len(run) for run in runs)
        most = max(most, len(mine) - kept, stored - kept)
    return most


def _runs(layout: Layout, rank: int, offset: int, length: int) -> Iterator[range]:
    """The member's tokens that a rank has, counted from its first."""
    for start in layout.chunk_starts(rank):
        first = max(start - offset, 0)
        yield range(first, max(min(start + layout.chunk_length - offset, length), first))


def _shared(one: range, other: range) -> int:
    return max(min(one.stop, other.stop) - max(one.start, other.start), 0)
