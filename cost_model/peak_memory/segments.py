"""Stretches of a program that backward may compute again: a layer around each attention.

Between two attentions the program is cut where least is alive, as late as that is so: behind a
layer, where just its hidden states go on. A segment that is computed again keeps what enters it and
what its attention gives; nothing of attention is run, and no message sent, twice.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from torch.fx import Node
from torch.utils.checkpoint import CheckpointPolicy

from ringfx.cost_model.peak_memory.liveness import Values, needed_by
from ringfx.cost_model.peak_memory.timeline_of import num_bytes
from ringfx.cost_model.prediction.products import op_name
from ringfx.ir.markers import OFFLOADED, SENT_AGAIN

__all__ = [
    "Segment", "again_nodes", "handed_on", "leaving_of", "recomputed", "segments_of", "tag",
]  # fmt: skip

ALIKE = 1.05
"""How far what is alive at two cuts may differ for the model to be as wide there."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Segment:
    """Nodes from one position of a program up to before another, with one attention among them."""

    number: int
    attention: Node
    start: int
    stop: int
    nodes: tuple[Node, ...]


def segments_of(values: Values) -> tuple[Segment, ...]:
    """One for each attention that trains; none where the user checkpoints parts of the program."""
    if any(n.meta.get("ac_graph_id") for n in values.nodes):
        return ()
    calls = [i for i, n in enumerate(values.nodes) if _trains(n, values)]
    if not calls:
        return ()
    alive = _alive(values)
    between = [_cut(alive, a, b) for a, b in pairwise(calls)]
    width = num_bytes(values.nodes[calls[-1]])  # about what a layer hands on
    most = ALIKE * max((int(alive[i]) for i in between), default=width)
    cuts = [_first(alive, calls[0], most), *between, _last(alive, calls[-1], most, width / 2)]
    return tuple(
        Segment(
            number=i, attention=values.nodes[call], start=start + 1, stop=stop + 1,
            nodes=values.nodes[start + 1 : stop + 1],
        )
        for i, (call, start, stop) in enumerate(zip(calls, cuts, cuts[1:], strict=False))
    )  # fmt: skip


def _trains(node: Node, values: Values) -> bool:
    is_call = node.op == "call_function" and op_name(node) == "attention"
    return is_call and node in values.has_grad


def _alive(values: Values) -> NDArray[np.int64]:
    """Bytes of values that a position, or one before it, made and a later one reads. What the
    program returns is kept anyhow."""
    made = {n: i for i, n in enumerate(values.nodes)}
    last: dict[Node, int] = {}
    for i, node in enumerate(values.nodes):
        for source in node.all_input_nodes:
            last[values.owner[source]] = i
    changes = np.zeros(len(values.nodes) + 1, np.int64)
    returned = len(values.nodes) - 1
    for node, end in last.items():
        if node.op == "call_function" and made[node] < end < returned:
            changes[made[node]] += num_bytes(node)
            changes[end] -= num_bytes(node)
    found: NDArray[np.int64] = changes.cumsum()[:-1]
    return found


def _cut(alive: NDArray[np.int64], first: int, second: int) -> int:
    """The last position of those after which least is alive."""
    window = alive[first:second]
    return first + int(np.flatnonzero(window == window.min())[-1])


def _first(alive: NDArray[np.int64], call: int, most: float) -> int:
    """Before the first attention: the last position where the model is as narrow as at cuts."""
    narrow = np.flatnonzero((alive[:call] <= most) & (alive[:call] > 0))
    return int(narrow[-1]) if len(narrow) else -1


def _last(alive: NDArray[np.int64], call: int, most: float, least: float) -> int:
    """Behind the last one: the last position as narrow as cuts, before next to nothing is left."""
    behind = alive[call:-1]
    falls = np.flatnonzero(behind < least)
    stop = int(falls[0]) if len(falls) else len(behind)
    narrow = np.flatnonzero(behind[:stop] <= most)
    return call + int(narrow[-1]) if len(narrow) else call


def recomputed(segment: Segment, values: Values) -> frozenset[Node]:
    """What may be computed again: not attention, and not what goes on to other segments.

    Random numbers are drawn again as they were: AOTAutograd replays their state.
    """
    leaving = leaving_of(segment, values)
    return frozenset(
        n
        for n in segment.nodes
        if n.op == "call_function" and op_name(n) != "attention" and values.owner[n] not in leaving
    )


def leaving_of(segment: Segment, values: Values) -> frozenset[Node]:
    """Values that are read behind the segment, themselves or views of them."""
    own = set(segment.nodes)
    return frozenset(
        values.owner[n] for n in segment.nodes if any(user not in own for user in n.users)
    )


def handed_on(segment: Segment, following: Segment | None, values: Values) -> frozenset[Node]:
    """Of what leaves a segment, what no other than the one behind it reads: hidden states.

    Backward needs them once, when it computes that one again.
    """
    if following is None or following.start != segment.stop:
        return frozenset()
    near = {*segment.nodes, *following.nodes}
    leaving = leaving_of(segment, values)
    views = {n: values.owner[n] for n in near if values.owner[n] in leaving}
    far = {owner for n, owner in views.items() if any(user not in near for user in n.users)}
    return leaving - far


def tag(
    segment: Segment,
    again: Collection[Node],
    of: Callable[[Node], Iterable[Node]],
    *,
    attention_again: bool,
    offloaded: Collection[Node] = (),
) -> None:
    """Tell AOTAutograd's partitioner to compute these again, and to keep the segment's others.

    ``of``: the nodes of the program that is compiled, of one of this one. ``offloaded``: what of it
    is kept in the host's memory.
    """
    for node in offloaded:
        for own in of(node):
            own.meta[OFFLOADED] = True
    if attention_again:
        again = {*again, segment.attention}
        for own in of(segment.attention):
            own.meta[SENT_AGAIN] = True
    for node in segment.nodes:
        policy = CheckpointPolicy.PREFER_RECOMPUTE if node in again else CheckpointPolicy.MUST_SAVE
        for own in of(node):
            if own.op == "call_function":
                own.meta["recompute"] = policy
                own.meta["ac_graph_id"] = segment.number + 1


def again_nodes(segment: Segment, values: Values, again: Collection[Node]) -> Collection[Node]:
    """Of these what is run: what leads to a value that a backward reads."""
    todo = [x for n in segment.nodes for x in needed_by(n, values)]
    found: set[Node] = set()
    while todo:
        node = todo.pop()
        if node in found or node not in again:
            continue
        found.add(node)
        todo += [values.owner[i] for i in node.all_input_nodes]
        todo += node.all_input_nodes
    return found
