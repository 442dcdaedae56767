"""Few queries over many keys: every rank has the queries, attends to its own keys, and all merge.

K and V stay where they are, forward and backward. With (o_r, l_r) the output and logsumexp of a
row over rank r's keys, and m = max over r of l_r,

    w_r = exp(l_r - m),   o = sum of w_r o_r / sum of w_r,   l = m + log(sum of w_r)

so the ranks sum H Q (E + 1) numbers and take the largest of H Q. Backward, with the merged o and l,
gives dK and dV of a rank's own keys, and dQ as a sum over the ranks.

It is no choice among strategies of sharded queries: placement says where it runs.

Shapes: B batch, H query heads, G key/value heads, Q all queries, K local keys, D and E the head
dims of q, k and of v.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

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
from ringfx.cost_model.prediction.work import Work, own_keys_work
from ringfx.ir.kernel_table import Pick
from ringfx.ops.tiling.attention_call import Problem
from ringfx.ops.tiling.merge import Gradients, Output, Sums, attend, attend_backward

__all__ = ["SPLIT_KV"]

Tensor = torch.Tensor


def forward(
    problem: Problem, q_BHQD: Tensor, k_BGKD: Tensor, v_BGKE: Tensor
) -> tuple[Tensor, Tensor]:
    """The output of all queries over all keys and its logsumexp, the same on every rank."""
    output, rank = Output.empty(problem, q_BHQD, v_BGKE.shape[-1]), problem.ranks.rank
    mine = problem.k_runs(rank)
    attend(problem, output, q_BHQD, k_BGKD, v_BGKE, problem.q_runs(rank), mine)
    return _merged(problem, *output.finish())


def backward(
    problem: Problem,
    dout_BHQE: Tensor,
    q_BHQD: Tensor,
    k_BGKD: Tensor,
    v_BGKE: Tensor,
    out_BHQE: Tensor,
    lse_BHQ: Tensor,
) -> Gradients:
    """The gradients of all queries and of the local keys and values."""
    sums, rank = Sums.empty(problem, q_BHQD, k_BGKD, v_BGKE), problem.ranks.rank
    attend_backward(
        problem, sums, dout_BHQE, q_BHQD, k_BGKD, v_BGKE, out_BHQE, lse_BHQ, problem.q_runs(rank),
        problem.k_runs(rank),
    )  # fmt: skip
    found = sums.finish()
    return replace(found, dq_BHQD=problem.ranks.all_reduce("backward: sum of dQ", found.dq_BHQD))


def _merged(problem: Problem, out_BHQE: Tensor, lse_BHQ: Tensor) -> tuple[Tensor, Tensor]:
    ranks = problem.ranks
    top_BHQ = ranks.largest("forward: largest logsumexp", lse_BHQ.clone())
    # A row that has seen no key here has -inf, perhaps on all ranks: no infinity becomes NaN.
    share_BHQ = torch.exp(lse_BHQ - top_BHQ).masked_fill_(lse_BHQ == -math.inf, 0.0)
    share_BHQ1 = share_BHQ[..., None].to(out_BHQE.dtype)
    parts = torch.cat([out_BHQE * share_BHQ1, share_BHQ1], -1)
    total = ranks.all_reduce("forward: merge of all keys", parts)
    shares_BHQ1 = total[..., -1:]
    merged = total[..., :-1] / shares_BHQ1.masked_fill(shares_BHQ1 == 0.0, 1.0)
    return merged, top_BHQ + shares_BHQ1[..., 0].to(top_BHQ.dtype).log()


# --- what it costs -------------------------------------------------------------------------------


def time(local: Local, profile: Profile, direction: Direction, pick: Pick) -> Phase:
    """All queries over a rank's keys; then small sums, which nothing hides:

    forward     t + max(r) + sum(o + r)
    backward    t + sum(q)
    """
    compute_s = max(
        work_seconds(profile, pick, local.site, work, direction, 1) for work in _own_keys(local)
    )
    sums = [local.rows, local.out_items + local.rows] if direction == "forward" else [local.q_items]
    messages_s = sum(
        message_seconds(profile, "all_reduce", local.world_size, items * local.accumulator_bytes)
        for items in sums
    )
    return Phase(compute_s=compute_s, communication_s=messages_s, exposed_s=messages_s)


def memory(local: Local, calls: Calls) -> Iterator[int]:
    """Forward (o + r) a and the call, then what is merged; backward (q + kv) a and the call."""
    call = calls.of(_own_keys(local), 1)
    if calls.direction == "forward":
        yield sums_forward(local) + call
        yield 3 * sums_forward(local)
        yield from output_moments(local)
    else:
        yield sums_backward(local) + call
        yield from gradient_moments(local)


def _own_keys(local: Local) -> Sequence[Work]:
    return own_keys_work(local.site.spec, local.layout, local.world_size)


SPLIT_KV = Strategy(
    name="split_kv",
    gloss="own keys, merged by logsumexp",
    summary="every rank attends to its own keys with all queries, and the results are merged",
    forward=forward,
    backward=backward,
    time=time,
    memory=memory,
    own_queries=False,
    whole_queries=True,
)
