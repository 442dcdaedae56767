"""All keys and values gathered at once, then one attention of the local queries.

One all-gather before the compute in forward; the same in backward, and one reduce-scatter of dK and
dV after it. Memory holds all of K and V; where that is much, of some heads at a time.

Shapes: B batch, H query heads, G key/value heads, S all tokens, D and E the head dims of q, k and
v, P ranks, N all elements of a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from ringfx.cost_model.prediction.footprint import (
    Calls,
    gradient_moments,
    output_moments,
    sums_backward,
    sums_forward,
)
from ringfx.cost_model.prediction.formulas import Phase, work_seconds
from ringfx.cost_model.prediction.profile import Profile
from ringfx.cost_model.prediction.profile_rows import Direction
from ringfx.cost_model.prediction.rank_share import Local
from ringfx.cost_model.prediction.strategy import Strategy
from ringfx.cost_model.prediction.terms import message_seconds
from ringfx.cost_model.prediction.work import Work, gathered_work
from ringfx.ir.kernel_table import Pick
from ringfx.ops.tiling.attention_call import Problem
from ringfx.ops.tiling.head_groups import HeadGroup, head_groups
from ringfx.ops.tiling.merge import Gradients, Output, Sum, Sums, attend, attend_backward
from ringfx.ops.tiling.pieces import Run
from ringfx.strategies import needed
from ringfx.strategies.packing import pack, unpack

__all__ = ["COLLECTIVE"]

Tensor = torch.Tensor

GATHERED_BYTES = 256 << 20
"""K and V of all ranks that are held at once, about: beyond it heads are gathered group by group,
each still a message far above the size at which links reach their bandwidth."""


def _groups(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[HeadGroup, ...]:
    least, asked = GATHERED_BYTES // problem.ranks.size, problem.head_groups
    return head_groups(q, k, v, least_bytes=least, asked=asked)


def forward(
    problem: Problem, q_BHQD: Tensor, k_BGKD: Tensor, v_BGKE: Tensor
) -> tuple[Tensor, Tensor]:
    """The output of the local queries over all keys and its logsumexp."""
    if needed.in_blocks(problem.spec):
        return needed.forward(problem, q_BHQD, k_BGKD, v_BGKE, ahead=needed.ALL_AT_ONCE)
    output = Output.empty(problem, q_BHQD, v_BGKE.shape[-1])
    mine, keys = problem.q_runs(problem.ranks.rank), _all_keys(problem)
    for group in _groups(problem, q_BHQD, k_BGKD, v_BGKE):
        k, v = k_BGKD[:, group.kv], v_BGKE[:, group.kv]
        k_BGSD, v_BGSE = _gather(problem, "forward: all-gather of K/V", k, v)
        part = output.of_heads(group.q)
        attend(problem.heads(group), part, q_BHQD[:, group.q], k_BGSD, v_BGSE, mine, keys)
        part.finish()
    return output.out_BHQE, output.lse_BHQ


def backward(
    problem: Problem,
    dout_BHQE: Tensor,
    q_BHQD: Tensor,
    k_BGKD: Tensor,
    v_BGKE: Tensor,
    out_BHQE: Tensor,
    lse_BHQ: Tensor,
) -> Gradients:
    """The gradients of the local queries, keys and values."""
    if needed.in_blocks(problem.spec):
        rows = (dout_BHQE, q_BHQD, k_BGKD, v_BGKE, out_BHQE, lse_BHQ)
        return needed.backward(problem, *rows, ahead=needed.ALL_AT_ONCE)
    ranks = problem.ranks
    sums = Sums.empty(problem, q_BHQD, k_BGKD, v_BGKE)
    mine, keys = problem.q_runs(ranks.rank), _all_keys(problem)
    for group in _groups(problem, q_BHQD, k_BGKD, v_BGKE):
        here = sums.of_heads(group)
        k, v = k_BGKD[:, group.kv], v_BGKE[:, group.kv]
        k_BGSD, v_BGSE = _gather(problem, "backward: all-gather of K/V", k, v)
        gathered = Sums(here.dq, Sum.empty(k_BGSD), Sum.empty(v_BGSE), sums.inputs)
        attend_backward(
            problem.heads(group),
            gathered,
            dout_BHQE[:, group.q],
            q_BHQD[:, group.q],
            k_BGSD,
            v_BGSE,
            out_BHQE[:, group.q],
            lse_BHQ[:, group.q],
            mine,
            keys,
        )
        found = gathered.finish()
        _scatter(problem, found.dk_BGKD, found.dv_BGKE, here)
    return Gradients(sums.dq.total_BHND, sums.dk.total_BHND, sums.dv.total_BHND, sums.inputs)


def _gather(
    problem: Problem, operation: str, k_BGKD: Tensor, v_BGKE: Tensor
) -> tuple[Tensor, Tensor]:
    """All K and V, in order of position, padding at the end."""
    ranks, layout = problem.ranks, problem.kv_layout
    whole = [x.new_empty(*x.shape[:2], layout.padded_length, x.shape[3]) for x in (k_BGKD, v_BGKE)]

    def place(rank: int, blocks: Iterable[Tensor]) -> None:
        for whole_BGSD, block_BGKD in zip(whole, blocks, strict=True):
            for there, here in layout.chunks(rank):
                whole_BGSD[:, :, there] = block_BGKD[:, :, here]

    place(ranks.rank, (k_BGKD, v_BGKE))
    for rank, block_N in ranks.iter_all_gather(operation, pack(k_BGKD, v_BGKE)):
        place(rank, unpack(block_N, k_BGKD, v_BGKE))
    return whole[0], whole[1]


def _scatter(problem: Problem, dk_BGSD: Tensor, dv_BGSE: Tensor, mine: Sums) -> None:
    """The sum over ranks of this rank's tokens, into its own gradients."""
    layout, local = problem.kv_layout, (mine.dk.total_BHND, mine.dv.total_BHND)

    def part(rank: int) -> Tensor:
        part_N = dk_BGSD.new_empty(sum(x.numel() for x in local))
        for whole_BGSD, part_BGKD in zip((dk_BGSD, dv_BGSE), unpack(part_N, *local), strict=True):
            for there, here in layout.chunks(rank):
                part_BGKD[:, :, here] = whole_BGSD[:, :, there]
        return part_N

    total_N = problem.ranks.reduce_scatter_parts("backward: reduce-scatter of dK/dV", part)
    for sum_BGKD, total_BGKD in zip(local, unpack(total_N, *local), strict=True):
        sum_BGKD.copy_(total_BGKD)


def _all_keys(problem: Problem) -> tuple[Run, ...]:
    return (Run(0, 0, problem.spec.kv_len),)


# --- what it costs -------------------------------------------------------------------------------


def time(local: Local, profile: Profile, direction: Direction, pick: Pick) -> Phase:
    """K and V are gathered whole, then attended at once; their gradients are reduce-scattered.

    Where all of K and V is much, in N groups of heads, one after the other:

    forward     t + gather(KV)
    backward    t + gather(KV) + scatter(dKV)
    """
    if needed.in_blocks(local.site.spec):
        return needed.time(local, profile, direction, pick, ahead=needed.ALL_AT_ONCE)
    p, groups = local.world_size, num_groups(local)
    work = gathered_work(local.site.spec, local.layout, p)
    compute_s = max(work_seconds(profile, pick, local.site, w, direction, groups) for w in work)
    others = (p - 1) * local.kv_items / groups
    messages_s = groups * message_seconds(profile, "all_gather", p, others * local.itemsize)
    if direction == "backward":
        gradient_bytes = others * local.accumulator_bytes
        messages_s += groups * message_seconds(profile, "reduce_scatter", p, gradient_bytes)
    return Phase(compute_s=compute_s, communication_s=messages_s, exposed_s=messages_s)


def num_groups(local: Local) -> int:
    """Groups of heads, as ``_groups`` makes them."""
    return local.groups(GATHERED_BYTES // local.world_size)


def memory(local: Local, calls: Calls) -> Iterator[int]:
    """Bytes held, moment by moment."""
    if needed.in_blocks(local.site.spec):
        return needed.memory(local, calls, ahead=needed.ALL_AT_ONCE)
    return (_forward_moments if calls.direction == "forward" else _backward_moments)(local, calls)


def _forward_moments(local: Local, calls: Calls) -> Iterator[int]:
    """(o + r) a + p kv e / N, and the call over all keys, or what is packed and arrives."""
    yield from output_moments(local)
    groups = num_groups(local)
    held = sums_forward(local) + _gathered(local)
    yield held + calls.of(_whole_rows(local), 1 / groups)
    yield held + _arriving(local, local.itemsize)


def _backward_moments(local: Local, calls: Calls) -> Iterator[int]:
    """(q + kv) a + p kv (e + a) / N, and the call over all keys, or the parts of dK and dV."""
    groups, a = num_groups(local), local.accumulator_bytes
    yield sums_backward(local) + _gathered(local) + _arriving(local, local.itemsize)
    held = sums_backward(local) + _gathered(local)
    held += local.world_size * local.kv_items // groups * a
    yield held + calls.of(_whole_rows(local), 1 / groups)
    yield held + local.kv_items // groups * a + _arriving(local, a)
    yield from gradient_moments(local)


def _gathered(local: Local) -> int:
    return local.world_size * local.kv_items // num_groups(local) * local.itemsize


def _arriving(local: Local, size: int) -> int:
    """A part that leaves and one that comes; of collectives on a GPU, all of them."""
    parts = 2 if local.site.device == "cpu" else 1 + local.world_size
    return parts * local.kv_items // num_groups(local) * size


def _whole_rows(local: Local) -> Iterable[Work]:
    return gathered_work(local.site.spec, local.layout, local.world_size)


COLLECTIVE = Strategy(
    name="collective",
    gloss="all-gather of K/V",
    summary="one all-gather of K/V, then fused attention of the local queries",
    forward=forward,
    backward=backward,
    time=time,
    memory=memory,
    all_keys=True,
    num_groups=num_groups,
)
