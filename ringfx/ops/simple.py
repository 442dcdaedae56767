"""Ring attention as a reader should first meet it.

The ranks stand in a ring. Everyone keeps its queries; the blocks of K and V travel from each rank
to the next. After p - 1 hops every query has met every key:

    block = my own K, V
    for hop in 0 .. p-1:
        merge attention(my queries, block) into my output
        send the block to the next rank, receive the previous rank's

In the backward dK and dV travel with their block, each rank adding its share, and one hop further
than the block itself, which brings them home.

Shapes: B batch, H query heads, G key/value heads, D and E the head dims of q, k and of v, N all
elements of a block.
"""

from __future__ import annotations

import torch

from ringfx.ops.blocks import pack, unpack
from ringfx.ops.local import Gradients, Output, Sums, attend, attend_backward
from ringfx.ops.problem import Problem

__all__ = ["backward", "forward"]

Tensor = torch.Tensor


def forward(
    problem: Problem, q_BHQD: Tensor, k_BGKD: Tensor, v_BGKE: Tensor
) -> tuple[Tensor, Tensor]:
    """The output of the local queries over all keys and its logsumexp."""
    ranks = problem.ranks
    output = Output.empty(q_BHQD, v_BGKE.shape[-1])
    block_N = pack(k_BGKD, v_BGKE) if ranks.size > 1 else None
    k, v = k_BGKD, v_BGKE
    for hop in range(ranks.size):
        owner = ranks.neighbour(-hop)
        attend(problem, output, q_BHQD, k, v, problem.q_runs(ranks.rank), problem.k_runs(owner))
        if block_N is not None and hop < ranks.size - 1:
            block_N = _pass_on(problem, f"forward: K/V, hop {hop + 1}", block_N)
            k, v = unpack(block_N, k_BGKD, v_BGKE)
    return output.finish()


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
    ranks = problem.ranks
    sums = Sums.empty(problem, q_BHQD, k_BGKD, v_BGKE)
    block_N = pack(k_BGKD, v_BGKE) if ranks.size > 1 else None
    travelling_N: Tensor | None = None
    k, v = k_BGKD, v_BGKE
    for hop in range(ranks.size):
        owner = ranks.neighbour(-hop)
        attend_backward(
            problem,
            sums,
            dout_BHQE,
            q_BHQD,
            k,
            v,
            out_BHQE,
            lse_BHQ,
            problem.q_runs(ranks.rank),
            problem.k_runs(owner),
        )
        if block_N is None:
            break
        share_N = pack(sums.dk.finish(), sums.dv.finish())
        if travelling_N is not None:
            share_N += travelling_N
        travelling_N = _pass_on(problem, f"backward: dK/dV, hop {hop + 1}", share_N)
        sums = sums.with_keys(sums.dk.total_BHND, sums.dv.total_BHND)
        if hop < ranks.size - 1:
            block_N = _pass_on(problem, f"backward: K/V, hop {hop + 1}", block_N)
            k, v = unpack(block_N, k_BGKD, v_BGKE)
    found = sums.finish()
    if travelling_N is None:
        return found
    dk, dv = unpack(travelling_N, k_BGKD, v_BGKE)
    return Gradients(found.dq_BHQD, dk, dv, found.inputs)


def _pass_on(problem: Problem, operation: str, block_N: Tensor) -> Tensor:
    """One hop: my block to the next rank, the previous rank's block to me."""
    ranks = problem.ranks
    return ranks.exchange(
        operation,
        send=block_N,
        to=ranks.neighbour(1),
        receive=torch.empty_like(block_N),
        source=ranks.neighbour(-1),
    ).wait()
