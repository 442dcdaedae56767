"""Gradients of parameters: each rank holds its part of the sum; a few messages complete them."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch.fx import Graph, Node

from ringfx import collectives
from ringfx.passes.capture.gradients import needs_grad
from ringfx.passes.place import Placement
from ringfx.passes.place.modes import Form
from ringfx.passes.rewrite.crossings import Crossings

__all__ = ["share_parameters"]

LARGEST_BUCKET = 25 * 2**20
"""Gradients summed in one message at most, as DistributedDataParallel's default bucket."""
SMALLEST_BUCKET = 2**20
"""Below this a message's latency outweighs its transfer (gloo on loopback: 0.3 ms, 1 GB/s)."""
NUM_BUCKETS = 8
"""Messages that a small model is cut into: the first leave while backward still computes, and the
flat copy that a message needs is an eighth of the gradients."""


def share_parameters(
    graph: Graph, inputs: Sequence[Node], placement: Placement, crossings: Crossings
) -> None:
    """Inputs that need a gradient and that split calls use whole enter the program in buckets.

    Buckets follow the order of first use, so that in backward each completes early.
    """
    used = [n for n in inputs if needs_grad(n) and _used_whole_by_split(n, placement)]
    order = {n: i for i, n in enumerate(next(iter(inputs)).graph.nodes)} if inputs else {}
    used.sort(key=lambda n: min(order[u] for u in n.users))
    for bucket in _buckets(used):
        _enter(graph, bucket, crossings)


def _used_whole_by_split(value: Node, placement: Placement) -> bool:
    for user in value.users:
        mode = placement.modes.get(user)
        if mode is None:
            continue
        operands = placement.lines.axes.ops[user].call.operands
        if any(
            n is value and form is not Form.SPLIT
            for n, form in zip(operands, mode.operands, strict=True)
        ):
            return True
    return False


def _buckets(values: Sequence[Node]) -> list[list[Node]]:
    """Values of one type up to a size, in order; one that fills a bucket goes alone."""
    total = sum(_bytes(v) for v in values)
    largest = min(LARGEST_BUCKET, max(SMALLEST_BUCKET, total // NUM_BUCKETS))
    buckets: list[list[Node]] = []
    filling: dict[torch.dtype, list[Node]] = {}
    for value in values:
        dtype = value.meta["val"].dtype
        bucket = filling.get(dtype)
        if bucket is not None and sum(map(_bytes, bucket)) + _bytes(value) <= largest:
            bucket.append(value)
            continue
        buckets.append([value])
        if _bytes(value) < largest:
            filling[dtype] = buckets[-1]
    return buckets


def _bytes(value: Node) -> int:
    fake = value.meta["val"]
    return int(fake.numel() * fake.element_size())


def _enter(graph: Graph, bucket: Sequence[Node], crossings: Crossings) -> None:
    crossings.report_gradients(bucket)
    natural = [crossings.natural_of(n) for n in bucket]
    shared = graph.call_function(collectives.share, (natural, crossings.group))
    shared.meta["ringfx_crossing"] = True
    for i, value in enumerate(bucket):
        entered = graph.call_function(operator.getitem, (shared, i))
        entered.meta["ringfx_crossing"] = True
        crossings.remember(value, Form.SHARED, entered)
