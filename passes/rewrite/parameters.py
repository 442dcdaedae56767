"""Gradients of parameters: each rank has its part of the sum; a few all-reduces complete them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.fx import Node
from torch.utils.checkpoint import CheckpointPolicy

from ringfx.comm import conjugate
from ringfx.comm.state_buckets import gather_state, gather_states
from ringfx.comm.state_ranks import StateRanks
from ringfx.ir.values import Captured, CommKind
from ringfx.passes.capture.gradients import needs_grad, receives_grad
from ringfx.passes.place import PlacementMap
from ringfx.passes.rewrite.conversions import PlacementConversions
from ringfx.passes.split_modes import LocalGraph, Placement
from ringfx.passes.split_modes.local_graph import describe, num_bytes

__all__ = ["States", "buckets", "gather_whole", "share_parameters"]

LARGEST_BUCKET = 25 * 2**20
"""Gradients summed in one all-reduce at most, as DistributedDataParallel's default bucket."""
SMALLEST_BUCKET = 2**20
"""Below this an all-reduce's latency outweighs its transfer (gloo on loopback: 0.3 ms, 1 GB/s)."""
NUM_BUCKETS = 8
"""Buckets that a small model is cut into: the first leave while backward still computes, and the
flat copy that an all-reduce needs is an eighth of the gradients."""


@dataclass(frozen=True, eq=False, kw_only=True)
class States:
    """The inputs of which a rank holds its rows."""

    ranks: StateRanks
    rows: dict[Node, Node] = field(default_factory=dict)
    """Parameter -> this rank's rows (a local placeholder)."""


def share_parameters(
    captured: Captured,
    placement: PlacementMap,
    conversions: PlacementConversions,
    states: States,
) -> None:
    """Inputs that need a gradient and that split calls use replicated enter in buckets.

    Buckets follow the order of first use, so that in backward each completes early. A bucket
    enters at the start of the program and leaves for its first user: in backward its all-reduce
    starts as soon as it is complete, and is waited for after everything else.

    Inputs of ``states`` are gathered before their first user, and again in backward.
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
    for bucket in buckets([n for n in parameters if n not in states.rows]):
        _enter(bucket, conversions, [number[n] for n in bucket])
    for bucket in buckets([n for n in parameters if n in states.rows]):
        _gather_on_use(bucket, conversions, states)
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
    reason = f"completes its gradient{_and_others(bucket)}"
    local.report(bucket[0], CommKind.ALL_REDUCE, size, reason, in_backward=True)
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


def _gather_on_use(
    bucket: Sequence[Node], conversions: PlacementConversions, states: States
) -> None:
    local, what, ranks = conversions.local, _listed(bucket), states.ranks
    size = sum(map(num_bytes, bucket))
    reduced = sum(ranks.bytes_reduced(n.meta["val"]) for n in bucket)
    more = _and_others(bucket)
    for kind, moved, reason, in_backward in (
        (CommKind.ALL_GATHER_STATES, size, f"of sharded parameters{more}", False),
        (CommKind.ALL_GATHER_STATES, size, f"of sharded parameters{more}, again", True),
        (CommKind.REDUCE_SCATTER, reduced // ranks.ranks, f"sums its gradient{more}", True),
    ):
        local.report(bucket[0], kind, moved, reason, in_backward=in_backward, ranks=ranks.others)

    def gather() -> None:
        parts, rows = [states.rows[n] for n in bucket], [_num_rows(n) for n in bucket]
        args = (parts, rows, ranks.as_argument(), what)
        gathered = _again(local.graph.call_function(gather_states, args))
        for i, value in enumerate(bucket):
            with local.graph.inserting_after(gathered):
                item = _again(local.graph.call_function(operator.getitem, (gathered, i)))
            conversions.remember(value, Placement.REPLICATED_PARTIAL_GRAD, item)

    for value in bucket:
        conversions.on_first_use(value, gather)


def gather_whole(value: Node, local: LocalGraph, states: States) -> Node:
    """A parameter for users that every rank repeats, or that needs no gradient."""
    local.report(
        value, CommKind.ALL_GATHER_STATES, num_bytes(value), "of a sharded parameter",
        ranks=states.ranks.others,
    )  # fmt: skip
    args = (states.rows[value], _num_rows(value), states.ranks.as_argument(), describe(value))
    if not needs_grad(value):
        return _again(local.graph.call_function(gather_state, args))
    # At the start: where it is first used gradients may be disabled, and later users' be lost.
    with local.graph.inserting_after(local.after_inputs()):
        gathered = _again(local.graph.call_function(gather_state, args))
    gathered.meta["ringfx_conversion"] = True
    return gathered


def _num_rows(parameter: Node) -> int:
    return int(parameter.meta["val"].shape[0])


def _again(node: Node) -> Node:
    """What is gathered is not kept for backward; inside of any checkpoint too."""
    node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
    node.meta["ac_graph_id"] = OF_NO_CHECKPOINT
    return node


OF_NO_CHECKPOINT = 1 << 30
"""torch keeps what a region hands to one of a higher number."""


def _and_others(bucket: Sequence[Node]) -> str:
    """After the name of the first."""
    return f", with {len(bucket) - 1} more" if len(bucket) > 1 else ""


def _listed(bucket: Sequence[Node]) -> str:
    names = [n.meta.get("ringfx_input", n.name) for n in bucket]
    if len(names) <= 2:
        return " and ".join(names)
    return f"{names[0]} and {len(names) - 1} more"
