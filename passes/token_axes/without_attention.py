"""The tokens of a program without attention: an axis of its inputs, chosen by what it is used for.

Attention says which axis is the sequence. Without it, an input's axis may be tokens

- if something runs along it as along a sequence: a convolution, a pool, a scan, a Fourier
  transform, channel attention; or
- if it is neither the batch (the first dimension of an input of several) nor the features (the last
  one of numbers): ids [B, S], states [B, S, C].

Of these the one that the most elements of the program have is taken, as a rank then holds 1/p of
the most. Another axis is a line of its own only if no tensor has both.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from ringfx.passes.axes import AxisMap, how
from ringfx.passes.axes.call import AxisSharing, result_values
from ringfx.passes.axes.propagate import NamedOp
from ringfx.passes.axes.rules import contraction, transforms
from ringfx.passes.axes.space import Dim

__all__ = ["InputAxis", "axes_of_inputs", "axes_that_are_given"]

SHORTEST = 4
"""Elements of an axis that may be tokens."""
COMPARABLE = 2
"""Axes that less than this factor differ in are told apart by what runs along them."""


@dataclass(frozen=True, eq=False, kw_only=True)
class InputAxis:
    """A dimension of an input that is taken for tokens."""

    node: Node
    dim: int
    length: int
    tokens: int
    """Of all sequences of the batch."""
    others: tuple[tuple[Node, int], ...] = ()
    """Dimensions of inputs that are used alike and as much: the first was taken."""


@dataclass(frozen=True, eq=False, kw_only=True)
class _Candidate:
    node: Node
    dim: int
    axis: Dim
    is_run_along: bool
    size: int
    elements: int
    """Of all values that have it."""

    @property
    def rank(self) -> tuple[bool, int, int]:
        return self.is_run_along, self.elements, self.size


def axes_of_inputs(
    graph: Graph,
    axes: AxisMap,
    held: Collection[Node],
    world_size: int,
    summed: Collection[Dim] = (),
) -> tuple[InputAxis, ...]:
    """The dimensions of inputs that are tokens, the most used first; none if none can be.

    Parameters
    ----------
    held
        Inputs that modules hold: parameters and buffers.
    summed
        Axes that channels are weighed over.
    """
    given = [n for n in graph.nodes if n.op == "placeholder" and n not in held and result_values(n)]
    left = list(_candidates(axes, given, world_size, {x for axis in summed for x in axis}))
    found: list[InputAxis] = []
    while left:
        most = max(c.elements for c in left)
        best = max((c for c in left if COMPARABLE * c.elements > most), key=lambda c: c.rank)
        meeting = _met(axes, best.axis)
        rest = [c for c in left if meeting.isdisjoint(c.axis)]
        alike = tuple(
            (c.node, c.dim)
            for c in left
            if c.rank == best.rank and c.axis != best.axis and c not in rest
        )
        batch = int(best.node.meta["val"].shape[0]) if best.dim else 1
        found.append(
            InputAxis(
                node=best.node, dim=best.dim, length=best.size, tokens=batch * best.size,
                others=alike,
            )
        )  # fmt: skip
        left = rest
    return tuple(found)


def axes_that_are_given(axes: AxisMap, given: Mapping[Node, int]) -> tuple[InputAxis, ...]:
    """The dimensions of inputs that a user says are tokens."""
    found: dict[Dim, InputAxis] = {}
    for node, dim in given.items():
        shape = node.meta["val"].shape
        batch = int(shape[0]) if dim else 1
        found.setdefault(
            axes.dims(node)[dim],
            InputAxis(node=node, dim=dim, length=int(shape[dim]), tokens=batch * int(shape[dim])),
        )
    return tuple(found.values())


def _candidates(
    axes: AxisMap, given: Sequence[Node], world_size: int, summed: Collection[int]
) -> Iterator[_Candidate]:
    run_along = {axis for named in axes.ops.values() for axis in _run_along(axes, named)}
    run_along |= set(summed)
    batch = {axes.dims(n)[0] for n in given if n.meta["val"].dim() > 1}
    seen: set[Dim] = set()
    for node in given:
        value = node.meta["val"]
        for d, axis in enumerate(axes.dims(node)):
            size = axes.space.size(axis)
            if size < max(SHORTEST, world_size) or axis in seen:
                continue
            is_run_along = not run_along.isdisjoint(axis)
            if not is_run_along and (value.dim() == 1 and axis in batch):
                continue
            if not is_run_along and not _may_be_tokens(value, d):
                continue
            seen.add(axis)
            yield _Candidate(
                node=node, dim=d, axis=axis, is_run_along=is_run_along, size=size,
                elements=_elements(axes, axis),
            )  # fmt: skip


def _may_be_tokens(value: torch.Tensor, dim: int) -> bool:
    """By its place: no features, and no batch where there is something beside it."""
    if value.is_floating_point() or value.is_complex():
        return 1 <= dim < value.dim() - 1
    return dim >= 1 or value.dim() == 1


def _elements(axes: AxisMap, axis: Dim) -> int:
    atoms = set(axis)
    return sum(
        value.numel()
        for node in axes.values
        for i, value in enumerate(result_values(node))
        if any(atoms & set(dim) for dim in axes.dims(node, i))
    )


def _met(axes: AxisMap, axis: Dim) -> set[int]:
    """The atoms of all values that have the axis."""
    atoms, met = set(axis), set[int]()
    for node in axes.values:
        for i in range(len(result_values(node))):
            here = {atom for dim in axes.dims(node, i) for atom in dim}
            if atoms & here:
                met |= here
    return met


def _run_along(axes: AxisMap, named: NamedOp) -> Iterator[int]:
    """The atoms along which a call runs as along a sequence."""
    source = named.call.operands[:1]
    if not source:
        return
    dims = axes.dims(source[0])
    family = named.axes.how
    if isinstance(family, how.Halo):
        along: Collection[int] = family.dims
    elif isinstance(family, how.Scan):
        along = (family.dim,)
    elif named.call.node.target in contraction.CONVOLUTIONS:
        along = range(len(dims) - len(named.call.shapes[1][2:]), len(dims))
    elif named.call.node.target in transforms.ALONG_A_SEQUENCE:
        along = [
            d
            for d, labels in enumerate(named.axes.operands[0] or ())
            if any(named.axes.share_of(x) is AxisSharing.NEEDS_ALL for x in labels)
        ]
    else:
        return
    for d in along:
        yield from dims[d]
