"""Gradients of parameters: each rank holds its part of the sum; a few messages complete them."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from torch.fx import Graph, Node

from ringfx import collectives
from ringfx.passes.capture.gradients import needs_grad
from ringfx.passes.place import Placement
from ringfx.passes.place.modes import Form
from ringfx.passes.rewrite.crossings import Crossings

__all__ = ["BUCKET_BYTES", "share_parameters"]

BUCKET_BYTES = 25 * 2**20
"""Gradients summed in one message, as DistributedDataParallel's default bucket."""


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
    buckets: list[list[Node]] = []
    sizes: dict[int, int] = {}
    for value in values:
        fake = value.meta["val"]
        size = fake.numel() * fake.element_size()
        last = buckets[-1] if buckets else None
        fits = last is not None and sizes[len(buckets) - 1] + size <= BUCKET_BYTES
        if last is not None and fits and last[0].meta["val"].dtype == fake.dtype:
            last.append(value)
            sizes[len(buckets) - 1] += size
        else:
            buckets.append([value])
            sizes[len(buckets) - 1] = size
    return buckets


def _enter(graph: Graph, bucket: Sequence[Node], crossings: Crossings) -> None:
    crossings.report_gradients(bucket)
    natural = [crossings.natural_of(n) for n in bucket]
    shared = graph.call_function(collectives.share, (natural, crossings.group))
    shared.meta["ringfx_crossing"] = True
    for i, value in enumerate(bucket):
        entered = graph.call_function(operator.getitem, (shared, i))
        entered.meta["ringfx_crossing"] = True
        crossings.remember(value, Form.SHARED, entered)
