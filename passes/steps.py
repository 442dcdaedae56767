"""Steps that several journeys share: a model's, an explanation's, one operator's."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from torch.fx import Graph, Node

from ringfx.ir.values import Arrival, AttentionSite, Captured, Declined, Sites
from ringfx.passes.axes import AxisMap, name_axes
from ringfx.passes.axes.call import AxisRules
from ringfx.passes.axes.rules import RULES
from ringfx.passes.detect import detect
from ringfx.passes.detect.count_attention import missed
from ringfx.passes.masks import recover
from ringfx.passes.normalize import (
    end_landmarks,
    insert_reshards,
    insert_turns,
    normalize,
    separate_columns,
)
from ringfx.passes.place import PlacementMap, by_channels, by_columns, by_rows
from ringfx.passes.token_axes import (
    InputAxis,
    Lines,
    axes_of_channel_maps,
    axes_of_inputs,
    axes_of_row_maps,
    axes_that_are_given,
    find_lines,
)

__all__ = ["Attentions", "find_attention", "find_tokens", "told_as_written"]

LONGEST_CHAIN = 16
"""Times that the program is normalized at most; twice is common, a stack of convolutions needs one
time for each."""


@dataclass(frozen=True, kw_only=True)
class Attentions:
    """What detection and an independent count make of a program."""

    sites: Sites
    missed: tuple[Declined, ...]
    by_rows: tuple[Declined, ...] = ()
    """Those that are split by rows of scores, and neither declined nor missed therefore."""
    by_columns: tuple[Declined, ...] = ()
    by_channels: tuple[Declined, ...] = ()
    """Those of channels, whose scores are sums over the ranks."""
    count: int


def find_attention(captured: Captured, *, rules: AxisRules = RULES) -> Attentions:
    """Detect attention, recover its masks, and count what detection did not see."""
    sites = recover(captured, detect(captured, rules))
    overlooked, count = missed(captured, sites)
    return Attentions(sites=sites, missed=overlooked, count=count)


def told_as_written(attentions: Attentions, graph: Graph, placement: PlacementMap) -> Attentions:
    """Of what is no attention that strategies compute, those that are split as written, apart."""
    sites = attentions.sites
    rows = by_rows(graph, placement, (*sites.declined, *attentions.missed))
    rest = [x for x in (*sites.declined, *attentions.missed) if x.node not in _names(rows)]
    channels = by_channels(graph, placement, rest)
    rest = [x for x in rest if x.node not in _names(channels)]
    columns = by_columns(graph, placement, rest)
    split = _names(rows) | _names(channels) | _names(columns)
    return replace(
        attentions,
        sites=replace(sites, declined=tuple(x for x in sites.declined if x.node not in split)),
        missed=tuple(x for x in attentions.missed if x.node not in split),
        by_rows=rows,
        by_columns=columns,
        by_channels=channels,
    )


def _names(entries: Sequence[Declined]) -> set[str]:
    return {x.node for x in entries}


def find_tokens(
    graph: Graph,
    sites: Sequence[AttentionSite],
    world_size: int,
    split: Mapping[Node, Arrival],
    *,
    normalized: bool = True,
    rules: AxisRules = RULES,
    held: Collection[Node] = (),
    is_whole: bool = False,
    token_dims: Mapping[Node, int] | None = None,
) -> tuple[AxisMap, Lines]:
    """Name all axes and find those along which tokens lie.

    Parameters
    ----------
    normalized
        The program is rewritten for it, in operators that can be split.
    held
        Inputs that modules hold: parameters and buffers.
    is_whole
        The program is the whole model: without attention, its tokens are an axis of an input.
    token_dims
        The dimensions of inputs that are to be tokens then; none: those that are used so.
    """
    axes = name_axes(graph, rules)
    inputs: tuple[InputAxis, ...] = ()
    if token_dims:
        inputs = axes_that_are_given(axes, token_dims)
    elif is_whole and not (sites or split):
        summed = axes_of_channel_maps(graph, axes, held)
        if not axes_of_row_maps(graph, axes, summed):
            inputs = axes_of_inputs(graph, axes, held, world_size, summed)
    lines = find_lines(graph, axes, sites, world_size, split, inputs, held)
    # A normalized call may show the next where tokens are.
    for _ in range(LONGEST_CHAIN if normalized and world_size > 1 else 0):
        changed = (
            normalize(graph, axes, lines)
            or end_landmarks(graph, axes, lines)
            or separate_columns(graph, lines)
            or insert_turns(graph, axes, lines, held)
            or insert_reshards(graph, axes, lines)
        )
        if not changed:
            break
        axes = name_axes(graph, rules)
        lines = find_lines(graph, axes, sites, world_size, split, inputs, held)
    return axes, lines
