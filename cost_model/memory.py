"""The peak of one rank's memory over a forward and a backward, and what it is made of.

The backward visits the operators in reverse. Everything is alive while the backward of the
operators at some interval of positions runs, and the peak is the largest sum over a position:

    a parameter's gradient                          from its last use on, to the start
    a kept value (``liveness.kept_values``)         until its own position
    a value of a checkpointed region, run again     within the region, until its first reader
    the gradient of a value                         from its last use to its own position
    what one operator needs for itself              at its position

Splitting divides what carries tokens by the ranks. Inductor keeps a loss's logits themselves and
writes their gradient over them, unless the caller has them too. It gives a buffer that is free to
the next value of its size and never returns one that it will give away again, so for each size it
holds the larger of what it needs now and the smaller of the most it needed and the most it will.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.fx import Graph, Node

from ringfx import tiles
from ringfx.cost_model.liveness import (
    Values,
    kept_values,
    needed_by,
    op_name,
    outputs_of,
    values_of,
)
from ringfx.cost_model.optimizers import state_bytes
from ringfx.ops import attention
from ringfx.passes.axes.call import given_input
from ringfx.passes.rewrite.parameters import buckets
from ringfx.passes.values import Captured
from ringfx.plan import LayerPlan, MemoryPart, MemoryPlan
from ringfx.spec import AttentionSpec
from ringfx.strategies import STRATEGIES

__all__ = ["predict_memory"]

MESSAGE_COPIES = 2
"""Gradients of some parameters joined to one message, and the message's result."""

AGAIN = "computed again for a checkpoint"
AGAIN_FOR_ATTENTION = "computed again for attention"

Kind = Literal["whole", "split", "attention"]

CAUSES: Mapping[str, Kind] = {
    "parameters": "whole",
    "masks given whole": "whole",
    "rows of whole masks": "split",
    "optimiser state": "whole",
    "parameter gradients": "whole",
    "gradients joined and summed": "whole",
    "activations kept for backward": "split",
    AGAIN: "split",
    "kept by attention": "attention",
    AGAIN_FOR_ATTENTION: "attention",
    "gradients of activations": "split",
    "temporaries": "split",
    "held by Inductor for reuse": "split",
    "attention's workspace": "attention",
}


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes that are alive while the backward is at the positions from ``first`` to ``last``."""

    cause: str
    node: Node
    bytes: int
    first: int
    last: int

    def at(self, position: int) -> bool:
        return self.first <= position <= self.last


def predict_memory(
    captured: Captured,
    *,
    carries_tokens: Callable[[Node], bool],
    layers: Mapping[str, LayerPlan],
    world_size: int,
    optimizer: str | int = "none",
    compiler: str = "aot_eager",
) -> MemoryPlan:
    """The peak of a step, as parts.

    Parameters
    ----------
    captured
        The program with global shapes.
    carries_tokens
        Whether a value is split over the ranks.
    layers
        The plan of each canonical attention, by the name of its node; those that are missing count
        nothing, which gives what there is outside attention.
    optimizer
        A name of ``optimizers.OPTIMIZERS``, or bytes of state for each parameter.
    compiler
        ``inductor`` holds buffers for reuse; ``eager`` keeps all that backwards need, and runs
        nothing again.
    """
    graph = captured.graph_module.graph
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    has_grad = dict(zip(inputs, captured.needs_grad, strict=True))
    parameters = [n for n, is_one in zip(inputs, captured.is_parameter, strict=True) if is_one]

    def size(node: Node) -> int:
        return math.ceil(_bytes(node) / (world_size if carries_tokens(node) else 1))

    rows = list(_taken(graph, layers, carries_tokens)) if world_size > 1 else []
    values = replace(values_of(graph, size, has_grad), taken=frozenset(rows))
    if compiler == "eager":
        values = replace(values, region={})
    trained = [n for n in parameters if has_grad[n]]
    everything, in_place = compiler == "eager", compiler == "inductor"
    held = list(_held(values, layers, trained, everything=everything, in_place=in_place))
    if world_size > 1 and values.has_grad:
        held += _messages(values, trained)
    position, reuse = _peak(held, len(values.nodes), reuses=compiler == "inductor")
    alive = [x for x in held if x.at(position)]

    def is_whole(node: Node) -> bool:
        return world_size > 1 and not carries_tokens(node)

    there = {
        "parameters": sum(map(_bytes, parameters)),
        "masks given whole": sum(map(_bytes, _given_masks(graph, parameters))),
        "rows of whole masks": sum(math.ceil(_bytes(n) / world_size) for n in rows),
        "optimiser state": sum(_state_bytes(optimizer, node) for node in trained),
        "held by Inductor for reuse": reuse,
    }
    return MemoryPlan(
        parts=tuple(_parts(alive, there, values.nodes[position], is_whole)),
        by_block=_by_block(alive),
        over_program=_over_program(held, len(values.nodes), there),
        unknown=("optimiser state",) if trained and optimizer == "none" else (),
    )


def _given_masks(graph: Graph, parameters: Sequence[Node]) -> Collection[Node]:
    """Inputs and buffers that attention reads as they stand, or cut: whole on every rank."""
    found = (given_input(x) for call in _attentions(graph) for x in _read(call))
    return {x for x in found if x is not None and x not in parameters}


def _taken(
    graph: Graph, layers: Mapping[str, LayerPlan], carries_tokens: Callable[[Node], bool]
) -> Iterator[Node]:
    """Whole masks and biases of which each rank takes the rows of its queries, once for all."""
    seen = set()
    for call in _attentions(graph):
        layer, spec = layers.get(call.name), AttentionSpec.from_json(str(call.kwargs["spec"]))
        if layer is not None and not _has_own_queries(layer):
            continue
        for i, dim in tiles.matrix_rows(spec.keep, spec.bias).items():
            value = _read(call)[i]
            if not carries_tokens(value) and (value, dim) not in seen:
                seen.add((value, dim))
                yield value


def _has_own_queries(layer: LayerPlan) -> bool:
    return not layer.is_replicated and STRATEGIES[layer.strategy].own_queries


def _attentions(graph: Graph) -> list[Node]:
    return graph.find_nodes(op="call_function", target=attention)


def _read(call: Node) -> Sequence[Node]:
    """What the tile functions of an attention read."""
    read: Any = call.args[3]
    return tuple(read)


def _parts(
    alive: Sequence[Held],
    there: Mapping[str, int],
    operator: Node,
    is_whole: Callable[[Node], bool],
) -> Iterator[MemoryPart]:
    """By cause; of what is split in general, what every rank has whole is a part of its own."""
    where = operator.meta.get("ringfx_path") or operator.name
    details = {
        "temporaries": f"{op_name(operator)} of {where}",
        "attention's workspace": where,
    }
    for cause, kind in CAUSES.items():
        mine = [x for x in alive if x.cause == cause]
        total = there.get(cause, 0) + sum(x.bytes for x in mine)
        whole = sum(x.bytes for x in mine if is_whole(x.node)) if kind == "split" else 0
        detail = details.get(cause, "")
        if total - whole:
            yield MemoryPart(cause=cause, bytes=total - whole, kind=kind, detail=detail)
        if whole:
            name = f"{cause}, replicated"
            yield MemoryPart(cause=name, bytes=whole, kind="replicated", detail=detail)


def _by_block(alive: Iterable[Held]) -> tuple[tuple[str, int], ...]:
    """Bytes by block, in program order: a path up to its first number, or all of it."""
    blocks: dict[str, int] = {}
    for x in sorted(alive, key=lambda x: x.first):
        if CAUSES[x.cause] != "whole":
            path = x.node.meta.get("ringfx_path", "")
            match = re.match(r".*?\.\d+(?=\.|$)", path)
            name = match[0] if match else path
            blocks[name] = blocks.get(name, 0) + x.bytes
    return tuple((name or "elsewhere", size) for name, size in blocks.items() if size)


STRETCHES = 60
"""Points of a chart of memory over the program."""


def _over_program(held: Sequence[Held], num: int, there: Mapping[str, int]) -> tuple[int, ...]:
    """Without what Inductor holds for reuse at the peak, which is no constant."""
    always = sum(there.values()) - there["held by Inductor for reuse"]
    stretches = np.array_split(_alive(held, num), min(num, STRETCHES))
    return tuple(int(stretch.max()) + always for stretch in stretches)


def _state_bytes(optimizer: str | int, parameter: Node) -> int:
    value: torch.Tensor = parameter.meta["val"]
    return state_bytes(optimizer, value.numel(), value.element_size())


def _messages(values: Values, trained: Sequence[Node]) -> Iterator[Held]:
    """The largest message so far of those that sum parameter gradients: passes/rewrite.

    Backward runs from the last position to the first, and completes a bucket where it reaches the
    first use of its first member.
    """
    first = {n: i for i, node in reversed([*enumerate(values.nodes)]) for n in node.all_input_nodes}
    used = sorted((n for n in trained if n in first), key=first.__getitem__)
    largest = 0
    for bucket in reversed(buckets(used)):
        size = MESSAGE_COPIES * sum(map(_bytes, bucket))
        last = first[bucket[0]] - 1
        if size > largest and last >= 0:
            cause, more = "gradients joined and summed", size - largest
            yield Held(cause=cause, node=bucket[0], bytes=more, first=0, last=last)
            largest = size


# --- the largest sum --------------------------------------------------------------------------


def _peak(held: Sequence[Held], num: int, *, reuses: bool) -> tuple[int, int]:
    """The position of the peak, and the bytes that are held there for reuse alone."""
    alive = _alive(held, num)
    if not reuses:
        return int(alive.argmax()), 0
    by_size: dict[int, list[Held]] = {}
    for x in held:
        if x.cause in REUSED:
            by_size.setdefault(x.bytes, []).append(x)
    idle = np.zeros(num, np.int64)
    for members in by_size.values():
        now = _alive(members, num)
        before = np.maximum.accumulate(now[::-1])[::-1]
        idle += np.minimum(before, np.maximum.accumulate(now)) - now
    position = int((alive + idle).argmax())
    return position, int(idle[position])


REUSED = frozenset(
    {
        "activations kept for backward",
        AGAIN,
        "gradients of activations",
        "temporaries",
    }
)


def _alive(held: Iterable[Held], num: int) -> NDArray[np.int64]:
    """Bytes alive at each position."""
    changes = np.zeros(num + 1, np.int64)
    for x in held:
        changes[x.first] += x.bytes
        changes[x.last + 1] -= x.bytes
    total: NDArray[np.int64] = changes.cumsum()[:num]
    return total


# --- what is alive when -----------------------------------------------------------------------


def _held(
    values: Values,
    layers: Mapping[str, LayerPlan],
    trained: Sequence[Node],
    *,
    everything: bool,
    in_place: bool,
) -> Iterator[Held]:
    """All that is ever alive; of a program without a backward, in the order that it runs."""
    last_use = _last_uses(values)
    if not values.has_grad:
        yield from _forward(values, layers, last_use)
        return
    kept = _needed(values) if everything else kept_values(values)
    kept = (kept | outputs_of(values)) - _kept_by_attention(values)
    end = len(values.nodes) - 1
    for node in trained:
        yield _whole_gradient(node, last_use)
    fused = _fused_losses(values) if in_place else frozenset()
    yield from _kept(values, kept, layers, end, fused)
    yield from _again(values, layers)
    handed_over = outputs_of(values) & values.has_grad
    for i, node in enumerate(values.nodes):
        if node not in values.has_grad or node.op != "call_function":
            continue
        for size in _own_bytes(node, values, kept, handed_over, fused):
            yield Held(cause="temporaries", node=node, bytes=size, first=i, last=i)
        yield from _workspace(node, i, layers)
        if values.owner[node] is node and last_use[node] > i:
            cause, size, last = "gradients of activations", values.bytes[node], last_use[node]
            if values.nodes[last] in fused and node not in kept:
                last -= 1
            yield Held(cause=cause, node=node, bytes=size, first=i + 1, last=last)


def _fused_losses(values: Values) -> frozenset[Node]:
    """Losses whose backward Inductor makes one pass over the logits of."""
    return frozenset(node for node in values.nodes if values.hidden(node))


def _whole_gradient(parameter: Node, last_use: Mapping[Node, int]) -> Held:
    cause, last = "parameter gradients", last_use[parameter]
    return Held(cause=cause, node=parameter, bytes=_bytes(parameter), first=0, last=last)


def _workspace(node: Node, position: int, layers: Mapping[str, LayerPlan]) -> Iterator[Held]:
    if node.name in layers:
        cause, size = "attention's workspace", layers[node.name].workspace_bytes
        yield Held(cause=cause, node=node, bytes=size, first=position, last=position)


def _kept(
    values: Values,
    kept: frozenset[Node],
    layers: Mapping[str, LayerPlan],
    end: int,
    fused: frozenset[Node],
) -> Iterator[Held]:
    """From the forward on, outside checkpointed regions."""
    for i, node in enumerate(values.nodes):
        if node in values.region:
            continue
        cause = "activations kept for backward"
        own = 0 if node in fused and _logits_are_kept(node, values, kept) else values.hidden(node)
        for size in (own, values.bytes[node] if node in kept else 0):
            yield Held(cause=cause, node=node, bytes=size, first=i, last=end)
        if node.name in layers:
            layer = layers[node.name]
            size = layer.result_bytes if _again_inputs(layer, values) else layer.saved_bytes
            yield Held(cause="kept by attention", node=node, bytes=size, first=i, last=end)


def _logits_are_kept(loss: Node, values: Values, kept: frozenset[Node]) -> bool:
    return any(values.owner[n] in kept for n in loss.all_input_nodes if n in values.has_grad)


def _again_inputs(layer: LayerPlan, values: Values) -> bool:
    """Whether the layer's q, k and v are computed again with their region."""
    return layer.site.checkpoint in values.region.values()


def _again(values: Values, layers: Mapping[str, LayerPlan]) -> Iterator[Held]:
    """What regions that are run again hold: from the first backward that reads one of a region's
    values, which may lie after the region, until the backward is past the value's first reader."""
    first: dict[Node, int] = {}
    ends: dict[int, int] = {}
    for i, node in enumerate(values.nodes):
        for needed in needed_by(node, values):
            if needed in values.region:
                first.setdefault(needed, i)
                ends[values.region[needed]] = i
    for needed in first.keys() - _kept_by_attention(values):
        cause, size, last = AGAIN, values.bytes[needed], ends[values.region[needed]]
        yield Held(cause=cause, node=needed, bytes=size, first=first[needed], last=last)
    for i, node in enumerate(values.nodes):
        if node.name in layers and _again_inputs(layers[node.name], values):
            layer = layers[node.name]
            size = layer.saved_bytes - layer.result_bytes
            last = max(i, ends.get(layer.site.checkpoint, i))
            yield Held(cause=AGAIN_FOR_ATTENTION, node=node, bytes=size, first=i, last=last)


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


def _own_bytes(
    node: Node,
    values: Values,
    kept: frozenset[Node],
    handed_over: frozenset[Node],
    fused: frozenset[Node],
) -> Iterator[int]:
    """Its output's gradient, values computed again for it, a loss's gradient of its own array.

    The gradient of a value that was handed to the caller comes twice: from there and from here.
    """
    yield values.bytes[node]
    yield 0 if node in fused else values.hidden(node)
    yield from _sizes((n for n in node.all_input_nodes if values.owner[n] in handed_over), values)
    if op_name(node) != "attention":
        elsewhere = (n for n in needed_by(node, values) if n not in kept)
        yield from _sizes((n for n in elsewhere if n not in values.region), values)


def _sizes(nodes: Iterable[Node], values: Values) -> Iterator[int]:
    """Bytes of several values, each once."""
    yield from (values.bytes[owner] for owner in {values.owner[n] for n in nodes})


def _forward(
    values: Values, layers: Mapping[str, LayerPlan], last_use: Mapping[Node, int]
) -> Iterator[Held]:
    """Without a backward a value lives until its last use."""
    for i, node in enumerate(values.nodes):
        last = max(i, last_use.get(node, i))
        yield Held(cause="temporaries", node=node, bytes=values.bytes[node], first=i, last=last)
        yield from _workspace(node, i, layers)


def _bytes(node: Node) -> int:
    value = node.meta.get("val")
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0
