"""Gradients of parameters: each rank has its part of the sum; a few all-reduces complete them."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch.fx import Node

from ringfx.comm import conjugate
from ringfx.ir.values import Captured, CommKind
from ringfx.passes.capture.gradients import receives_grad
from ringfx.passes.place import PlacementMap
from ringfx.passes.rewrite.conversions import PlacementConversions
from ringfx.passes.split_modes import Placement
from ringfx.passes.split_modes.local_graph import num_bytes

__all__ = ["buckets", "share_parameters"]

LARGEST_BUCKET = 25 * 2**20
"""Gradients summed in one all-reduce at most, as DistributedDataParallel's default bucket."""
SMALLEST_BUCKET = 2**20
"""Below this an all-reduce's latency outweighs its transfer (gloo on loopback: 0.3 ms, 1 GB/s)."""
NUM_BUCKETS = 8
"""Buckets that a small model is cut into: the first leave while backward still computes, and the
flat copy that an all-reduce needs is an eighth of the gradients."""


def share_parameters(
    captured: Captured, placement: PlacementMap, conversions: PlacementConversions
) -> None:
    """Inputs that need a gradient and that split calls use replicated enter in buckets.

    Buckets follow the order of first use, so that in backward each completes early. A bucket
    enters at the start of the program and leaves for its first user: in backward its all-reduce
    starts as soon as it is complete, and is waited for after everything else.
    """
    nodes = list(captured.graph_module.graph.nodes)
    inputs = [n for n in nodes if n.op == "placeholder"]
    number = {n: i for i, n in enumerate(inputs)}
    order = {n: i for i, n in enumerate(nodes)}
    wanted = receives_grad(captured.graph_module.graph)
    arrived = placement.lines.arrived
    used = [
        n
        for n in inputs
        if n in wanted and n not in arrived and _used_replicated_by_split(n, placement)
    ]
    used.sort(key=lambda n: min(order[u] for u in n.users))
    parameters = [n for n in used if captured.is_parameter[number[n]]]
    for bucket in buckets(parameters):
        _enter(bucket, conversions, [number[n] for n in bucket])
    for bucket in buckets([n for n in used if n not in set(parameters)]):
        _enter(bucket, conversions, [])


def _used_replicated_by_split(value: Node, placement: PlacementMap) -> bool:
    for user in value.users:
        mode = placement.modes.get(user)
        if mode is None:
            continue
        operands = placement.lines.axes.ops[user].call.operands
        if any(
            n is value and wanted is Placement.REPLICATED_PARTIAL_GRAD
            for n, wanted in zip(operands, mode.operands, strict=True)
        ):
            return True
    return False


def buckets(values: Sequence[Node]) -> list[list[Node]]:
    """Values of one type up to a size, in order of use; one that fills a bucket goes alone."""
    total = sum(num_bytes(v) for v in values)
    largest = min(LARGEST_BUCKET, max(SMALLEST_BUCKET, total // NUM_BUCKETS))
    found: list[list[Node]] = []
    filling: dict[torch.dtype, list[Node]] = {}
    for value in values:
        dtype = value.meta["val"].dtype
        bucket = filling.get(dtype)
        if bucket is not None and sum(map(num_bytes, bucket)) + num_bytes(value) <= largest:
            bucket.append(value)
            continue
        found.append([value])
        if num_bytes(value) < largest:
            filling[dtype] = found[-1]
    return found


def _enter(bucket: Sequence[Node], conversions: PlacementConversions, numbers: list[int]) -> None:
    """``numbers``: those of the bucket's inputs, if their gradients may be held back."""
    what = f"the gradients of {_listed(bucket)}"
    local = conversions.local
    size = sum(map(num_bytes, bucket))
    local.report(bucket[0], CommKind.ALL_REDUCE, size, f"completes {what}", in_backward=True)
    given = [conversions.as_produced[n] for n in bucket]
    entered = local.graph.call_function(conjugate.grad_bucket_wait, (given,))
    entered.meta["ringfx_conversion"] = True

    def leave() -> None:
        args = (entered, local.call, numbers, local.group, what)
        shared = local.graph.call_function(conjugate.grad_bucket_start, args)
        for i, value in enumerate(bucket):
            with local.graph.inserting_after(shared):
                item = local.graph.call_function(operator.getitem, (shared, i))
                item.meta["ringfx_input_node"] = given[i]
            conversions.remember(value, Placement.REPLICATED_PARTIAL_GRAD, item)

    for value in bucket:
        conversions.on_first_use(value, leave)


def _listed(bucket: Sequence[Node]) -> str:
    names = [n.meta.get("ringfx_input", n.name) for n in bucket]
    if len(names) <= 2:
        return " and ".join(names)
    return f"{names[0]} and {len(names) - 1} more"
