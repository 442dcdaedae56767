"""Axes of tokens that weigh one another, where no attention was found over them.

``f(q @ k.T) @ v`` whose f reads whole rows of scores stays written out. Its tokens are a line of
their own, so that each rank computes the rows of its own queries
(``ringfx.passes.normalize.rows_and_columns``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TypeAlias

from torch.fx import Graph, Node

from ringfx.ir.markers import every_token
from ringfx.passes.axes import AxisMap
from ringfx.passes.axes.call import AxisSharing, result_values
from ringfx.passes.axes.space import Dim
from ringfx.passes.token_axes.token_line import Lines

__all__ = ["axes_of_row_maps", "columns_of_rows", "is_product", "weighings"]


def axes_of_row_maps(graph: Graph, axes: AxisMap, attended: Collection[Dim]) -> list[Dim]:
    """Axes of both rows and columns of scores: made by one product and used up by another.

    None that is a part of a longer axis whose other parts the scores have too (a chunk of a
    recurrence, but not the patches of an image), and none that lies beside an attended axis in some
    value: its values are split along that one.
    """
    found: dict[Dim, set[Node]] = {}
    for axis, value in (*_paired(graph, axes), *_separated(graph, axes)):
        found.setdefault(axis, set()).add(value)
    taken = {atom for axis in attended for atom in axis}
    beside = _beside(axes, taken)
    return [
        x for x, where in found.items()
        if not (taken | beside) & set(x) and not any(_is_chunk(axes, x, n) for n in where)
    ]  # fmt: skip


def is_product(axes: AxisMap, node: Node) -> bool:
    """Whether a call sums products of two values."""
    named = axes.ops.get(node)
    if named is None:
        return False
    shares = named.axes.share.values()
    return len(named.call.operands) > 1 and AxisSharing.PARTIAL_SUM in shares


def _paired(graph: Graph, axes: AxisMap) -> Iterator[tuple[Dim, Node]]:
    """With the scores that have it twice."""
    sources = _sources(axes)
    made = [(x, n) for n in _computed(graph) for x in _meeting(axes, n, sources)]
    used = {x for n in axes.ops if is_product(axes, n) for x in _weighed(axes, n, sources)}
    yield from ((axis, scores) for axis, scores in made if axis in used)


Sources: TypeAlias = Mapping[Dim, Collection[Dim]]
"""The axes of which each is a window."""


def _sources(axes: AxisMap) -> Sources:
    found: dict[Dim, set[Dim]] = {}
    for window in axes.windows:
        source, result = axes.space.resolve(window.source), axes.space.resolve(window.result)
        found.setdefault(result, set()).update((source, *found.get(source, ())))
    return found


def _computed(graph: Graph) -> Iterator[Node]:
    """Calls that depend on what the program is given."""
    found: set[Node] = set()
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr") or found.intersection(node.all_input_nodes):
            found.add(node)
            if node.op == "call_function":
                yield node


def _twice(axes: AxisMap, value: Node, sources: Sources) -> set[Dim]:
    """Axes that a value has as rows and, or a window of them, as columns."""
    dims = [axis for axis in axes.dims(value) if axis] if axes.values.get(value) else []
    return {
        axis
        for i, axis in enumerate(dims)
        if any(x == axis or axis in sources.get(x, ()) for x in dims[:i] + dims[i + 1 :])
    }


def _meeting(axes: AxisMap, node: Node, sources: Sources) -> set[Dim]:
    """Axes that the call makes rows and columns of, from two values of one of them each."""
    named = axes.ops.get(node)
    if named is None or len(named.call.operands) < 2:
        return set()
    found = _twice(axes, node, sources)
    return found - {x for n in named.call.operands for x in _twice(axes, n, sources)}


def _weighed(axes: AxisMap, node: Node, sources: Sources) -> Iterator[Dim]:
    """Axes that an operand of a product has twice, one of which is summed with another operand."""
    for value in axes.ops[node].call.operands:
        yield from _weighed_by(axes, node, value, sources)


def _weighed_by(axes: AxisMap, node: Node, weights: Node, sources: Sources) -> set[Dim]:
    operands = axes.ops[node].call.operands
    summed = {x for n in operands if n is not weights for x in axes.dims(n)}
    summed |= {y for x in summed for y in sources.get(x, ())}
    return _twice(axes, weights, sources) & summed & set(axes.dims(node))


def columns_of_rows(graph: Graph, axes: AxisMap) -> frozenset[Dim]:
    """The axes of values of every token that rows read, and their windows."""
    found = {
        axis
        for node in graph.find_nodes(op="call_function", target=every_token)
        for axis in _parted(axes, node, node)
    }
    windows = (x for x, sources in _sources(axes).items() if found.intersection(sources))
    return frozenset(found.union(windows))


def weighings(graph: Graph, lines: Lines) -> Iterator[tuple[Node, Node]]:
    """The products of rows of weights with values, and their weights.

    At one rank, where rows and columns are one axis still, those that would be of rows.
    """
    axes, sources = lines.axes, _sources(lines.axes)
    columns = columns_of_rows(graph, axes)
    whole = [line for line in lines.lines if line.layout.world_size == 1]
    paired = {x for x, _ in _paired(graph, axes) if any(line.member(x) for line in whole)}
    for node in graph.nodes:
        if not is_product(axes, node):
            continue
        operands = axes.ops[node].call.operands
        for weights in operands:
            others = {x for n in operands if n is not weights for x in axes.dims(n)}
            summed = columns & others & set(axes.dims(weights)) - set(axes.dims(node))
            if not lines.dims_with_tokens(weights):
                continue
            if summed or (paired and paired & _weighed_by(axes, node, weights, sources)):
                yield node, weights
                break


def _separated(graph: Graph, axes: AxisMap) -> Iterator[tuple[Dim, Node]]:
    """Axes of which every token is read by each row already, and in which value."""
    for node in graph.find_nodes(op="call_function", target=every_token):
        source = node.args[0]
        assert isinstance(source, Node)
        yield from ((axis, source) for axis in _parted(axes, node, source))


def _parted(axes: AxisMap, node: Node, value: Node) -> Iterator[Dim]:
    """Of a value of every token, or of its source, the axes of those tokens."""
    dims = node.args[1]
    assert isinstance(dims, list | tuple)
    yield from (x for d in dims if isinstance(d, int) and (x := axes.dims(value)[d]))


def _is_chunk(axes: AxisMap, axis: Dim, value: Node) -> bool:
    """Whether it was cut from a longer axis whose other atoms the value has too."""
    cut_from = axes.space.ancestors()
    longer = {x for atom in axis for x in cut_from.get(atom, ())}
    others = {atom for x in longer for atom in axes.space.resolve((x,))} - set(axis)
    return not others.isdisjoint(atom for dim in axes.dims(value) for atom in dim)


def _beside(axes: AxisMap, taken: Collection[int]) -> set[int]:
    """Atoms that some value has together with one of those."""
    found: set[int] = set()
    for node in axes.values if taken else ():
        for i in range(len(result_values(node))):
            atoms = {atom for dim in axes.dims(node, i) for atom in dim}
            found |= atoms if atoms & set(taken) else set()
    return found - set(taken)
