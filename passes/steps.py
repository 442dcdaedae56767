"""Steps that several journeys share: a model's, an explanation's, one operator's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch.fx import Graph, Node

from ringfx.ir.values import Arrival, AttentionSite, Captured, Declined, Sites
from ringfx.passes.axes import AxisMap, name_axes
from ringfx.passes.axes.call import AxisRules
from ringfx.passes.axes.rules import RULES
from ringfx.passes.detect import detect
from ringfx.passes.detect.count_attention import missed, refuse_missed
from ringfx.passes.masks import recover
from ringfx.passes.normalize import insert_reshards, normalize, separate_columns
from ringfx.passes.token_axes import Lines, find_lines

__all__ = ["Attentions", "find_attention", "find_tokens"]

LONGEST_CHAIN = 16
"""Times that the program is normalized at most; twice is common, a stack of convolutions needs one
time for each."""


@dataclass(frozen=True, kw_only=True)
class Attentions:
    """What detection and an independent count make of a program."""

    sites: Sites
    missed: tuple[Declined, ...]
    count: int


def find_attention(captured: Captured, *, strict: bool, rules: AxisRules = RULES) -> Attentions:
    """Detect attention, recover its masks, and count what detection did not see.

    Raises
    ------
    AttentionMissed
        With ``strict``, if something looks like attention and is neither found nor declined.
    """
    sites = recover(captured, detect(captured, rules))
    overlooked, count = missed(captured, sites)
    if strict:
        refuse_missed(overlooked)
    return Attentions(sites=sites, missed=overlooked, count=count)


def find_tokens(
    graph: Graph,
    sites: Sequence[AttentionSite],
    world_size: int,
    split: Mapping[Node, Arrival],
    *,
    normalized: bool = True,
    rules: AxisRules = RULES,
) -> tuple[AxisMap, Lines]:
    """Name all axes and find those along which tokens lie.

    ``normalized``: the program is rewritten for it, in operators that can be split.
    """
    axes = name_axes(graph, rules)
    lines = find_lines(graph, axes, sites, world_size, split)
    # A normalized call may show the next where tokens are.
    for _ in range(LONGEST_CHAIN if normalized and world_size > 1 else 0):
        changed = (
            normalize(graph, axes, lines)
            or separate_columns(graph, lines)
            or insert_reshards(graph, axes, lines)
        )
        if not changed:
            break
        axes = name_axes(graph, rules)
        lines = find_lines(graph, axes, sites, world_size, split)
    return axes, lines
