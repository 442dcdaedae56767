"""Gradients of parameters: each rank holds its part of the sum; a few messages complete them."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch.fx import Graph, Node

from ringfx.comm import conjugate
from ringfx.ir.values import Captured
from ringfx.passes.capture.gradients import receives_grad
from ringfx.passes.place import Placement
from ringfx.passes.place.split_modes import Form
from ringfx.passes.rewrite.crossings import Crossings

__all__ = ["buckets", "share_parameters"]

LARGEST_BUCKET = 25 * 2**20
"""Gradients summed in one message at most, as DistributedDataParallel's default bucket."""
SMALLEST_BUCKET = 2**20
"""Below this a message's latency outweighs its transfer (gloo on loopback: 0.3 ms, 1 GB/s)."""
NUM_BUCKETS = 8
"""Messages that a small model is cut into: the first leave while backward still computes, and the
flat copy that a message needs is an eighth of the gradients."""


def share_parameters(
    graph: Graph, captured: Captured, placement: Placement, crossings: Crossings
) -> None:
    """Inputs that need a gradient and that split calls use whole enter the program in buckets.

    Buckets follow the order of first use, so that in backward each completes early. A bucket
    enters at the start of the program and leaves for its first user: in backward its message is
    sent as soon as it is complete, and waited for after everything else.
    """
    nodes = list(captured.graph_module.graph.nodes)
    inputs = [n for n in nodes if n.op == "placeholder"]
    number = {n: i for i, n in enumerate(inputs)}
    order = {n: i for i, n in enumerate(nodes)}
    wanted = receives_grad(captured.graph_module.graph)
    arrived = placement.lines.arrived
    used = [
        n for n in inputs if n in wanted and n not in arrived and _used_whole_by_split(n, placement)
    ]
    used.sort(key=lambda n: min(order[u] for u in n.users))
    parameters = [n for n in used if captured.is_parameter[number[n]]]
    for bucket in buckets(parameters):
        _enter(graph, bucket, crossings, [number[n] for n in bucket])
    for bucket in buckets([n for n in used if n not in set(parameters)]):
        _enter(graph, bucket, crossings, [])


def _used_whole_by_split(value: Node, placement: Placement) -> bool:
    for user in value.users:
        mode = placement.modes.get(user)
        if mode is None:
            continue
        operands = placement.lines.axes.ops[user].call.operands
        if any(
            n is value and form is Form.SHARED
            for n, form in zip(operands, mode.operands, strict=True)
        ):
            return True
    return False


def buckets(values: Sequence[Node]) -> list[list[Node]]:
    """Values of one type up to a size, in order of use; one that fills a bucket goes alone."""
    total = sum(_bytes(v) for v in values)
    largest = min(LARGEST_BUCKET, max(SMALLEST_BUCKET, total // NUM_BUCKETS))
    found: list[list[Node]] = []
    filling: dict[torch.dtype, list[Node]] = {}
    for value in values:
        dtype = value.meta["val"].dtype
        bucket = filling.get(dtype)
        if bucket is not None and sum(map(_bytes, bucket)) + _bytes(value) <= largest:
            bucket.append(value)
            continue
        found.append([value])
        if _bytes(value) < largest:
            filling[dtype] = found[-1]
    return found


def _bytes(value: Node) -> int:
    fake = value.meta["val"]
    return int(fake.numel() * fake.element_size())


def _enter(graph: Graph, bucket: Sequence[Node], crossings: Crossings, members: list[int]) -> None:
    """``members``: the numbers of the bucket's inputs, if their gradients may be held back."""
    what = f"the gradients of {_listed(bucket)}"
    size = sum(map(_bytes, bucket))
    crossings.report(bucket[0], "all_reduce", size, f"completes {what}", in_backward=True)
    natural = [crossings.natural_of(n) for n in bucket]
    entered = graph.call_function(conjugate.grad_bucket_wait, (natural,))
    entered.meta["ringfx_crossing"] = True

    def leave() -> None:
        args = (entered, crossings.call, members, crossings.group, what)
        shared = graph.call_function(conjugate.grad_bucket_start, args)
        for i, value in enumerate(bucket):
            with graph.inserting_after(shared):
                item = graph.call_function(operator.getitem, (shared, i))
            crossings.remember(value, Form.SHARED, item)

    for value in bucket:
        crossings.on_first_use(value, leave)


def _listed(bucket: Sequence[Node]) -> str:
    names = [n.meta.get("ringfx_input", n.name) for n in bucket]
    if len(names) <= 2:
        return " and ".join(names)
    return f"{names[0]} and {len(names) - 1} more"
