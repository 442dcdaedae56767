"""The grain of a line: single tokens, or blocks of them, such as rows of an image or its windows.

Where tokens are viewed as ``(blocks, tokens of a block)`` a split by single tokens ends: no part of
such a tensor is a run of tokens. A split into runs of whole blocks goes on. So where tokens are cut
into pieces each first part of them is tried as the axis of the line, and what ranks save most by is
taken.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import networkx as nx
from torch.fx import Node

from ringfx.passes.axes import AxisMap
from ringfx.passes.axes.call import result_values
from ringfx.passes.axes.space import Dim
from ringfx.passes.token_axes.token_line import Lines, NotShardable, TokenDim

__all__ = ["in_blocks"]

Blocks = Mapping[Dim, Dim]
"""Axes of tokens, and the first part of each that is to be the axis of its line."""
Value = tuple[Node, int]
"""One tensor of a value."""


def in_blocks(
    lines: Lines,
    axes: Collection[Dim],
    rigid: Collection[Dim],
    build: Callable[[Blocks], Lines],
) -> Lines:
    """The lines of ``build`` under which most is split.

    Axes that no tensor has together are decided apart, as the layers of a model mostly are.

    Parameters
    ----------
    axes
        Those that would be lines, token by token.
    rigid
        Axes whose attention has no mask for padding between the ranks' runs.
    """
    chosen: dict[Dim, Dim] = {}
    if not any(len(axis) > 1 for axis in axes):
        return lines
    for group, values in _groups(lines.axes, axes):
        best, improved = _saved(lines, values), True
        while improved:
            tried = [
                (build(blocks), blocks)
                for axis in group
                if axis not in chosen and _is_cut(lines, axis, values)
                for option in _options(group, axis)
                if (blocks := {**chosen, **option})
            ]
            fitting = [
                (_saved(built, values), built, blocks)
                for built, blocks in tried
                if built.arrived == lines.arrived and _fits(built, blocks, rigid)
            ]
            most = max(fitting, key=lambda option: option[0], default=(best, lines, chosen))
            improved = most[0] > best
            if improved:
                best, lines, chosen = most
    return lines


def _groups(axes: AxisMap, lines: Collection[Dim]) -> Iterator[tuple[list[Dim], list[Value]]]:
    """Axes that tensors have together, and those tensors."""
    owners: dict[int, list[Dim]] = {}
    for axis in lines:
        for atom in axis:
            owners.setdefault(atom, []).append(axis)
    graph = nx.Graph()
    graph.add_nodes_from(lines)
    found: list[tuple[Dim, Value]] = []
    for node in axes.values:
        for i in range(len(result_values(node))):
            atoms = (atom for dim in axes.dims(node, i) for atom in dim)
            met = list(dict.fromkeys(axis for atom in atoms for axis in owners.get(atom, ())))
            graph.add_edges_from((met[0], other) for other in met[1:])
            found += [(axis, (node, i)) for axis in met[:1]]
    for group in nx.connected_components(graph):
        if any(len(axis) > 1 for axis in group):
            yield [a for a in lines if a in group], [v for axis, v in found if axis in group]


def _options(axes: Collection[Dim], axis: Dim) -> Iterator[dict[Dim, Dim]]:
    """A first part of the axis as blocks, and of others that share the rest what is beside it."""
    for stop in range(1, len(axis)):
        rest = set(axis[stop:])
        others = {other: _beside(other, rest) for other in axes if other != axis}
        yield {axis: axis[:stop]} | {other: part for other, part in others.items() if part}


def _beside(axis: Dim, rest: Collection[int]) -> Dim:
    """What comes before the rest; () if nothing does, or if it has none of it."""
    first = next((i for i, atom in enumerate(axis) if atom in rest), 0)
    return axis[:first]


def _is_cut(lines: Lines, axis: Dim, values: Sequence[Value]) -> bool:
    """Whether some tensor has tokens of the axis in a way that cannot be split."""
    atoms = set(axis)
    return any(
        isinstance(lines.token_dim(*value), NotShardable)
        and any(atoms & set(dim) for dim in lines.axes.dims(*value))
        for value in values
    )


def _fits(lines: Lines, blocks: Blocks, rigid: Collection[Dim]) -> bool:
    """Whether no attention would need a mask for padding that it cannot have."""
    padded = {m.axis for line in lines.lines if line.layout.is_padded for m in line.members}
    return not any(axis in rigid and block in padded for axis, block in blocks.items())


def _saved(lines: Lines, values: Sequence[Value]) -> int:
    """Elements that a rank need not have because values can be split."""
    total = 0
    for node, i in values:
        tokens = lines.token_dim(node, i)
        if isinstance(tokens, TokenDim):
            held = lines.lines[tokens.line].layout.local_length
            length = max(tokens.member.length, 1)
            size = result_values(node)[i].numel()
            total += size * max(length - held, 0) // length
    return total
