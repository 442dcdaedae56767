"""What is alive when in a step, and for what.

The backward visits the operators in reverse. Everything is alive while the backward of the
operators at some interval of positions runs:

    a parameter's gradient                          from its last use on, to the start
    a kept value (``liveness.kept_values``)         until its own position
    a value of a checkpointed region, run again     within the region, until its first reader
    the gradient of a value                         from its last use to its own position
    what one operator needs for itself              at its position

Inductor keeps a loss's logits themselves and writes their gradient over them, unless the caller has
them too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from ringfx.comm.state_ranks import StateRanks
from ringfx.cost_model.peak_memory.liveness import (
    Values,
    chunked_call,
    kept_values,
    needed_by,
    outputs_of,
)
from ringfx.cost_model.prediction.products import op_name
from ringfx.ir.memory_timeline import (
    AGAIN_FOR_ATTENTION,
    CHUNK,
    GATHERED,
    KEPT,
    KEPT_BY_ATTENTION,
    MESSAGES,
    WORKSPACE,
)
from ringfx.ir.plan import LayerPlan
from ringfx.passes.rewrite.parameters import buckets

__all__ = [
    "AGAIN", "Held", "Sharded", "again_ranges", "keeps_result", "num_bytes", "of_activations",
    "of_attention", "of_states",
]  # fmt: skip

MESSAGE_COPIES = 2
"""Gradients of some parameters joined to one message, and the message's result."""

AGAIN = "recomputed for checkpoints"


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes that are alive while the backward is at the positions from ``first`` to ``last``."""

    cause: str
    node: Node
    bytes: int
    first: int = 0
    last: int = 0
    of: Node | None = None
    """The value whose memory it is; None: no value's, and of any length the same."""
    all_ranks: int = 0
    """Of a sharded state: bytes of all ranks of a sequence together."""

    def at(self, position: int) -> bool:
        return self.first <= position <= self.last


@dataclass(frozen=True, eq=False, kw_only=True)
class Sharded:
    """Parameters of which each rank holds its rows."""

    nodes: frozenset[Node]
    ranks: StateRanks

    def held(self, cause: str, node: Node, last: int, whole: int | None = None) -> Held:
        """One rank's share of a state of so many bytes; by default, of those of a parameter."""
        whole = self.ranks.bytes_kept(node.meta["val"]) if whole is None else whole
        mine, sequence = -(-whole // self.ranks.ranks), -(-whole // self.ranks.replicas)
        cause = f"sharded {cause}"
        return Held(cause=cause, node=node, bytes=mine, last=last, all_ranks=sequence)


def of_states(
    values: Values, trained: Sequence[Node], sharded: Sharded | None = None
) -> Iterator[Held]:
    """What parameters have in a backward: gradients, and messages of them."""
    if not values.has_grad:
        return
    last_use = _last_uses(values)
    yield from _messages(values, trained, sharded)
    for node in trained:
        yield _whole_gradient(node, last_use, sharded)
    yield from _gathered(trained, sharded, len(values.nodes) - 1)


def of_activations(values: Values, *, everything: bool, in_place: bool) -> Iterator[Held]:
    """All that is ever alive outside attention, states apart; of a program without a backward, in
    the order that it runs."""
    last_use = _last_uses(values)
    if not values.has_grad:
        yield from _chunks(values, 0, in_place)
        yield from _forward(values, last_use)
        return
    kept = _needed(values) if everything else kept_values(values)
    kept = (kept | outputs_of(values)) - _kept_by_attention(values)
    end = len(values.nodes) - 1
    fused = _fused_losses(values) if in_place else frozenset()
    yield from _kept(values, kept, end, fused)
    yield from _again(values)
    yield from _chunks(values, end, in_place)
    handed_over = outputs_of(values) & values.has_grad
    for i, node in enumerate(values.nodes):
        if node not in values.has_grad or node.op != "call_function":
            continue
        for own in _own(node, values, kept, handed_over, fused):
            yield _value("temporaries", node, own, values, i, i)
        if values.owner[node] is node and last_use[node] > i:
            last = last_use[node]
            if values.nodes[last] in fused and node not in kept:
                last -= 1
            yield _value("gradients of activations", node, node, values, i + 1, last)


def _chunks(values: Values, end: int, in_place: bool) -> Iterator[Held]:
    """What regions in chunks hold: one chunk, and a loss the gradients that it is left with."""
    for i, node in enumerate(values.nodes):
        chunked = chunked_call(node)
        if chunked is None:
            continue
        size = chunked.bytes(in_place=in_place)
        yield Held(cause=CHUNK, node=node, bytes=size, first=i, last=i)
        if chunked.is_loss:
            for of in _owners(node.all_input_nodes, values):
                if of in values.has_grad:
                    yield _value(KEPT, node, of, values, i, end)


def _value(cause: str, node: Node, of: Node, values: Values, first: int, last: int) -> Held:
    """The memory of a value, or a copy of it, that a node brings."""
    size = values.bytes[of]
    return Held(cause=cause, node=node, bytes=size, first=first, last=last, of=of if size else None)


def _fused_losses(values: Values) -> frozenset[Node]:
    """Losses whose backward Inductor makes one pass over the logits of."""
    return frozenset(node for node in values.nodes if values.hidden(node))


def _whole_gradient(parameter: Node, last_use: Mapping[Node, int], sharded: Sharded | None) -> Held:
    cause, last = "parameter gradients", last_use[parameter]
    if sharded is not None and parameter in sharded.nodes:
        return sharded.held(cause, parameter, last)
    return Held(cause=cause, node=parameter, bytes=num_bytes(parameter), first=0, last=last)


def _gathered(trained: Sequence[Node], sharded: Sharded | None, end: int) -> Iterator[Held]:
    """Whole parameters of two buckets: one in use, one that is gathered, and its flat message."""
    found = [] if sharded is None else buckets([n for n in trained if n in sharded.nodes])
    sizes = sorted((sum(map(num_bytes, bucket)) for bucket in found), reverse=True)
    if sizes:
        size = MESSAGE_COPIES * sizes[0] + sum(sizes[1:2])
        yield Held(cause=GATHERED, node=found[0][0], bytes=size, first=0, last=end)


def of_attention(
    values: Values, layers: Mapping[str, LayerPlan], ends: Mapping[Node, int]
) -> Iterator[Held]:
    """What attention's layers hold, as the timeline counts it, by position.

    ``ends``: the last position of the segment that an attention is in.
    """
    number = {node: i for i, node in enumerate(values.nodes) if node.name in layers}
    again = {node: (first, last) for node, first, last in again_ranges(values, number)}
    end = len(values.nodes) - 1
    for node, i in number.items():
        layer = layers[node.name]
        if values.has_grad:
            back = layer.host_result_bytes
            kept = 0 if layer.attention_again else layer.result_bytes - back
            size = kept if keeps_result(node, values) else layer.saved_bytes
            yield Held(cause=KEPT_BY_ATTENTION, node=node, bytes=size, first=i, last=end)
            if back:
                yield Held(cause=KEPT_BY_ATTENTION, node=node, bytes=back, first=i, last=ends[node])
        if node in again:
            kept = 0 if layer.attention_again else layer.result_bytes
            size, (first, last) = layer.saved_bytes - kept, again[node]
            yield Held(cause=AGAIN_FOR_ATTENTION, node=node, bytes=size, first=first, last=last)
        if node in values.has_grad or not values.has_grad:
            size = layer.workspace_bytes
            yield Held(cause=WORKSPACE, node=node, bytes=size, first=i, last=i)


def _kept(
    values: Values,
    kept: frozenset[Node],
    end: int,
    fused: frozenset[Node],
) -> Iterator[Held]:
    """From the forward on, outside checkpointed regions."""
    for i, node in enumerate(values.nodes):
        if node in values.region:
            continue
        is_logits = node in fused and _logits_are_kept(node, values, kept)
        own = [] if is_logits else values.hidden(node)
        for of in (*own, node) if node in kept else own:
            yield _value(KEPT, node, of, values, i, end)


def _logits_are_kept(loss: Node, values: Values, kept: frozenset[Node]) -> bool:
    return any(values.owner[n] in kept for n in loss.all_input_nodes if n in values.has_grad)


def keeps_result(call: Node, values: Values) -> bool:
    """Whether the attention's q, k and v are computed again with their region."""
    return values.around.get(call, 0) in values.region.values()


def _again(values: Values) -> Iterator[Held]:
    """What regions that are run again hold: from the first backward that reads one of a region's
    values, which may lie after the region, until the backward is past the value's first reader."""
    first: dict[Node, int] = {}
    for i, node in enumerate(values.nodes):
        for needed in needed_by(node, values):
            if needed in values.region:
                first.setdefault(needed, i)
    ends = _region_ends(values)
    for needed in first.keys() - _kept_by_attention(values):
        last = ends[values.region[needed]]
        yield _value(AGAIN, needed, needed, values, first[needed], last)


def _region_ends(values: Values) -> Mapping[int, int]:
    """The last position whose backward reads a value of the region."""
    read = [(i, x) for i, node in enumerate(values.nodes) for x in needed_by(node, values)]
    return {values.region[x]: i for i, x in read if x in values.region}


def again_ranges(values: Values, calls: Collection[Node]) -> Iterator[tuple[Node, int, int]]:
    """Attentions whose inputs are computed again, and where those are alive."""
    ends = _region_ends(values)
    for i, node in enumerate(values.nodes):
        if node in calls and keeps_result(node, values):
            yield node, i, max(i, ends.get(values.around[node], i))


def _needed(values: Values) -> frozenset[Node]:
    """All that any backward reads, as eager autograd keeps it."""
    needed = (x for node in values.nodes for x in needed_by(node, values))
    return frozenset(x for x in needed if values.bytes[x])


def _kept_by_attention(values: Values) -> frozenset[Node]:
    """q, k, v and output of attention, which its layer plan counts, and masks that stay whole, of
    which it keeps rows."""
    found = [n for n in values.nodes if op_name(n) == "attention" and n.op == "call_function"]
    counted = {values.owner[x] for n in found for x in (*n.all_input_nodes[:3], n)}
    return frozenset(counted | values.taken)


def _last_uses(values: Values) -> Mapping[Node, int]:
    """The last position at which a value, or a view of it, is used."""
    last: dict[Node, int] = {}
    for i, node in enumerate(values.nodes):
        last[values.owner[node]] = max(i, last.get(values.owner[node], 0))
        for source in node.all_input_nodes:
            last[values.owner[source]] = i
    return last


def _own(
    node: Node,
    values: Values,
    kept: frozenset[Node],
    handed_over: frozenset[Node],
    fused: frozenset[Node],
) -> Iterator[Node]:
    """Its output's gradient, values computed again for it, a loss's gradient of its own array: each
    as large as the value that stands for it.

    The gradient of a value that was handed to the caller comes twice: from there and from here.
    """
    yield node
    yield from () if node in fused else values.hidden(node)
    yield from _owners((n for n in node.all_input_nodes if values.owner[n] in handed_over), values)
    if op_name(node) != "attention":
        elsewhere = (n for n in needed_by(node, values) if n not in kept)
        yield from _owners((n for n in elsewhere if n not in values.region), values)


def _owners(nodes: Iterable[Node], values: Values) -> Collection[Node]:
    """Several values, each once."""
    return {values.owner[n] for n in nodes}


def _forward(values: Values, last_use: Mapping[Node, int]) -> Iterator[Held]:
    """Without a backward a value lives until its last use."""
    for i, node in enumerate(values.nodes):
        last = max(i, last_use.get(node, i))
        yield _value("temporaries", node, node, values, i, last)


def _messages(values: Values, trained: Sequence[Node], sharded: Sharded | None) -> Iterator[Held]:
    """The largest message so far of those that sum parameter gradients: passes/rewrite.

    Of sharded states the one before it is still under way.

    Backward runs from the last position to the first, and completes a bucket where it reaches the
    first use of its first member.
    """
    first = {n: i for i, node in reversed([*enumerate(values.nodes)]) for n in node.all_input_nodes}
    used = sorted((n for n in trained if n in first), key=first.__getitem__)
    largest = before = 0
    for bucket in reversed(buckets(used)):
        message = sum(map(num_bytes, bucket))
        size = MESSAGE_COPIES * message + before
        before = message if sharded is not None and sharded.nodes else 0
        last = first[bucket[0]] - 1
        if size > largest and last >= 0:
            more = size - largest
            yield Held(cause=MESSAGES, node=bucket[0], bytes=more, first=0, last=last)
            largest = size


def num_bytes(node: Node) -> int:
    value = node.meta.get("val")
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0
