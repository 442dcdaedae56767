"""The peak of one rank's memory over a forward and a backward, and what it is made of.

The backward visits the operators in reverse. When it reaches operator i there are alive

    parameters, and the gradients of those used at or after i
    the kept values made at or before i          (``liveness.kept_values``)
    the gradients of values made before i and used at or after it
    what the operator itself needs: values computed again, its inputs' gradients, its workspace

and the peak is the largest sum over i. Splitting divides what carries tokens by the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from ringfx.cost_model.liveness import (
    Values,
    kept_values,
    needed_by,
    op_name,
    outputs_of,
    values_of,
)
from ringfx.passes.rewrite.parameters import LARGEST_BUCKET, NUM_BUCKETS, SMALLEST_BUCKET
from ringfx.passes.values import Captured
from ringfx.plan import LayerPlan, MemoryPart, MemoryPlan

__all__ = ["predict_memory"]

MESSAGE_COPIES = 2
"""Gradients of some parameters joined to one message, and the message's result."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """What is alive while the backward of one operator runs."""

    node: Node
    kept: int = 0
    gradients: int = 0
    parameter_gradients: int = 0
    own: int = 0
    attention_kept: int = 0
    workspace: int = 0

    @property
    def total(self) -> int:
        alive = self.kept + self.gradients + self.parameter_gradients + self.attention_kept
        return alive + self.own + self.workspace


def predict_memory(
    captured: Captured,
    *,
    carries_tokens: Callable[[Node], bool],
    layers: Mapping[str, LayerPlan],
    world_size: int,
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
    """
    inputs = [n for n in captured.graph_module.graph.nodes if n.op == "placeholder"]
    has_grad = dict(zip(inputs, captured.needs_grad, strict=True))
    parameters = [n for n, is_one in zip(inputs, captured.is_parameter, strict=True) if is_one]

    def size(node: Node) -> int:
        return math.ceil(_bytes(node) / (world_size if carries_tokens(node) else 1))

    values = values_of(captured.graph_module.graph, size, has_grad)
    trained = [n for n in parameters if has_grad[n]]
    peak = max(_moments(values, layers, trained), key=lambda moment: moment.total)
    message = _largest_message(trained) if world_size > 1 else 0
    whole = MemoryPart(cause="parameters", bytes=sum(map(_bytes, parameters)), kind="whole")
    return MemoryPlan(
        parts=tuple(part for part in (whole, *_peak_parts(peak, message)) if part.bytes),
        unknown=("optimiser state",) if trained else (),
    )


def _peak_parts(peak: Moment, message_bytes: int) -> list[MemoryPart]:
    where = peak.node.meta.get("ringfx_path") or peak.node.name
    at = f"{op_name(peak.node)} of {where}"
    return [
        MemoryPart(cause="parameter gradients", bytes=peak.parameter_gradients, kind="whole"),
        MemoryPart(
            cause="gradients joined and summed", bytes=MESSAGE_COPIES * message_bytes, kind="whole"
        ),
        MemoryPart(cause="activations kept for backward", bytes=peak.kept, kind="split"),
        MemoryPart(cause="kept by attention", bytes=peak.attention_kept, kind="attention"),
        MemoryPart(cause="gradients of activations", bytes=peak.gradients, kind="split"),
        MemoryPart(cause="temporaries", bytes=peak.own, kind="split", detail=at),
        MemoryPart(
            cause="attention's workspace", bytes=peak.workspace, kind="attention", detail=where
        ),
    ]


def _largest_message(trained: Sequence[Node]) -> int:
    """Bytes of the largest bucket in which parameter gradients are summed: passes/rewrite."""
    sizes = [_bytes(node) for node in trained]
    bucket = min(LARGEST_BUCKET, max(SMALLEST_BUCKET, sum(sizes) // NUM_BUCKETS))
    return max([*sizes, min(bucket, sum(sizes))], default=0)


def _moments(
    values: Values, layers: Mapping[str, LayerPlan], trained: Sequence[Node]
) -> list[Moment]:
    """One for each operator that has a backward, or for each of all if nothing trains."""
    if not values.has_grad:
        return _forward_moments(values, layers)
    outputs = outputs_of(values)
    kept = (kept_values(values) | outputs) - _kept_by_attention(values)
    handed_over = outputs & values.has_grad
    last_use = _last_uses(values)
    kept_bytes = attention_bytes = 0
    gradients, parameters = _Ending(), _Ending()
    for node in trained:
        parameters.add(_bytes(node), until=last_use[node])
    moments = []
    for i, node in enumerate(values.nodes):
        kept_bytes += values.hidden(node) + (values.bytes[node] if node in kept else 0)
        layer = layers.get(node.name)
        attention_bytes += layer.saved_bytes if layer else 0
        gradients.reach(i)
        parameters.reach(i)
        if node in values.has_grad and node.op == "call_function":
            moments.append(
                Moment(
                    node=node,
                    kept=kept_bytes,
                    gradients=gradients.bytes,
                    parameter_gradients=parameters.bytes,
                    own=_own_bytes(node, values, kept, handed_over),
                    attention_kept=attention_bytes,
                    workspace=layer.workspace_bytes if layer else 0,
                )
            )
            if values.owner[node] is node:
                gradients.add(values.bytes[node], until=last_use[node])
    return moments


class _Ending:
    """Bytes of things that each last until a position."""

    def __init__(self) -> None:
        self.bytes = 0
        self._ending: dict[int, int] = {}

    def add(self, size: int, *, until: int) -> None:
        self.bytes += size
        self._ending[until] = self._ending.get(until, 0) + size

    def reach(self, position: int) -> None:
        """Whatever lasted until a position before this one is gone."""
        self.bytes -= self._ending.pop(position - 1, 0)


def _kept_by_attention(values: Values) -> frozenset[Node]:
    """Inputs and output of attention: its layer plan counts them."""
    found = [n for n in values.nodes if op_name(n) == "attention" and n.op == "call_function"]
    return frozenset(values.owner[x] for n in found for x in (*n.all_input_nodes, n))


def _last_uses(values: Values) -> Mapping[Node, int]:
    """The last position at which a value, or a view of it, is used."""
    last: dict[Node, int] = {}
    for i, node in enumerate(values.nodes):
        last[values.owner[node]] = max(i, last.get(values.owner[node], 0))
        for source in node.all_input_nodes:
            last[values.owner[source]] = i
    return last


def _own_bytes(
    node: Node, values: Values, kept: frozenset[Node], handed_over: frozenset[Node]
) -> int:
    """Its output's gradient, values computed again for it, a loss's gradient of its own array.

    The gradient of a value that was handed to the caller comes twice: from there and from here.
    """
    own = values.bytes[node] + values.hidden(node)
    own += values.of(n for n in node.all_input_nodes if values.owner[n] in handed_over)
    if op_name(node) == "attention":
        return own
    return own + values.of(n for n in needed_by(node, values) if n not in kept)


def _forward_moments(values: Values, layers: Mapping[str, LayerPlan]) -> list[Moment]:
    """Without a backward a value lives until its last use."""
    last_use = _last_uses(values)
    alive = _Ending()
    moments = []
    for i, node in enumerate(values.nodes):
        alive.reach(i)
        alive.add(values.bytes[node], until=max(i, last_use.get(node, i)))
        layer = layers.get(node.name)
        workspace = layer.workspace_bytes if layer else 0
        moments.append(Moment(node=node, own=alive.bytes, workspace=workspace))
    return moments


def _bytes(node: Node) -> int:
    value = node.meta.get("val")
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0
