"""Inputs that an earlier program of the same model left split: they say how their line lies."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch.fx import Node

from ringfx.ir.layout import Layout, LayoutKind
from ringfx.ir.values import Arrival
from ringfx.passes.axes import AxisMap
from ringfx.passes.axes.space import AxisClash, Dim
from ringfx.passes.token_axes.axis_on_line import AxisOnLine

__all__ = ["Fixed", "Laid", "arriving", "fixed_layouts"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Fixed:
    """An input whose tokens are an axis of the program, and how they lie."""

    node: Node
    axis: Dim
    arrival: Arrival
    num_bytes: int


@dataclass(frozen=True, eq=False, kw_only=True)
class Laid:
    """A line whose layout and offsets an input gives."""

    layout: Layout
    members: tuple[AxisOnLine, ...]


def arriving(axes: AxisMap, arrivals: Mapping[Node, Arrival]) -> list[Fixed]:
    """The inputs whose split dimension holds their tokens as an axis of its own."""
    for node, arrival in arrivals.items():
        _parts(axes, node, arrival)  # all are cut before any is read
    found = []
    for node, arrival in arrivals.items():
        value, parts = node.meta["val"], _parts(axes, node, arrival)
        if parts is not None and parts[1]:
            size = value.numel() * value.element_size()
            found.append(Fixed(node=node, axis=parts[1], arrival=arrival, num_bytes=size))
    return found


def _parts(axes: AxisMap, node: Node, arrival: Arrival) -> tuple[Dim, ...] | None:
    """The split dimension as [outer, tokens, inner], cut so where it was not yet."""
    sizes = (arrival.outer, arrival.length, arrival.inner)
    try:
        return axes.space.regroup((axes.dims(node)[arrival.dim],), sizes)
    except AxisClash:
        return None


def fixed_layouts(
    claimed: Mapping[Dim, Sequence[AxisOnLine]],
    together: Iterable[Collection[Dim]],
    attended: Collection[Dim],
    fixed: Sequence[Fixed],
) -> tuple[dict[Dim, Laid], dict[Dim, LayoutKind]]:
    """Lines that lie as their inputs do, and the kind of layout of all that meet them.

    Where inputs disagree those with the most bytes decide.
    """
    laid: dict[Dim, Laid] = {}
    kinds: dict[Dim, LayoutKind] = {}
    for lines in together:
        offers = [
            (f.num_bytes, line, offer)
            for line in lines
            for f in fixed
            if (offer := _offer(claimed[line], f, attended)) is not None
        ]
        if not offers:
            continue
        kind = _heaviest([(weight, offer.layout.kind) for weight, _, offer in offers])
        kinds |= dict.fromkeys(lines, kind)
        for weight, line, offer in sorted(offers, key=lambda x: -x[0]):
            if offer.layout.kind == kind and weight:
                laid.setdefault(line, offer)
    return laid, kinds


def _heaviest(offers: Sequence[tuple[int, LayoutKind]]) -> LayoutKind:
    weights: dict[LayoutKind, int] = {}
    for weight, kind in offers:
        weights[kind] = weights.get(kind, 0) + weight
    return max(weights, key=lambda kind: (weights[kind], kind))


def _offer(members: Sequence[AxisOnLine], fixed: Fixed, attended: Collection[Dim]) -> Laid | None:
    """The line laid out as an input on it is; None if attention would run beyond its end."""
    own = next((m for m in members if m.axis == fixed.axis), None)
    if own is None:
        return None
    layout, shift = fixed.arrival.layout, fixed.arrival.offset - own.offset
    moved = [replace(m, offset=m.offset + shift) for m in members]
    inside = [m for m in moved if m.offset >= 0 and m.offset + m.length <= layout.length]
    if any(m.axis in attended for m in moved if m not in inside):
        return None
    return Laid(layout=layout, members=tuple(inside))
