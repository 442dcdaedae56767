"""Ring attention as a reader should first meet it.

The ranks stand in a ring. Everyone keeps its queries; the blocks of K and V travel from each rank
to the next. After p - 1 hops every query has met every key:

    block = my own K, V
    for hop in 0 .. p-1:
        merge attention(my queries, block) into my output
        send the block to the next rank, receive the previous rank's

In the backward dK and dV travel with their block, each rank adding its share to them, and one hop
further than the block itself, which brings them home.

Shapes: B batch, H query heads, G key/value heads, D and E the head dims of q, k and of v, N all
elements of a block.
"""

from __future__ import annotations

import torch

from ringfx.ops.kernels.kernel import accumulation_dtype
from ringfx.ops.strategies import needed
from ringfx.ops.strategies.packing import pack, unpack
from ringfx.ops.tiling.attention_call import Problem
from ringfx.ops.tiling.merge import Gradients, Output, Sum, Sums, attend, attend_backward

__all__ = ["backward", "forward"]

Tensor = torch.Tensor


def forward(
    problem: Problem, q_BHQD: Tensor, k_BGKD: Tensor, v_BGKE: Tensor
) -> tuple[Tensor, Tensor]:
    """The output of the local queries over all keys and its logsumexp."""
    if needed.in_blocks(problem):
        return needed.forward(problem, q_BHQD, k_BGKD, v_BGKE, ahead=0)
    ranks = problem.ranks
    output = Output.empty(problem, q_BHQD, v_BGKE.shape[-1])
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
    if needed.in_blocks(problem):
        given = (dout_BHQE, q_BHQD, k_BGKD, v_BGKE, out_BHQE, lse_BHQ)
        return needed.backward(problem, *given, ahead=0)
    ranks = problem.ranks
    mine = problem.q_runs(ranks.rank)
    rows = dout_BHQE, q_BHQD
    results = out_BHQE, lse_BHQ
    if ranks.size == 1:
        sums = Sums.empty(problem, q_BHQD, k_BGKD, v_BGKE)
        keys = problem.k_runs(0)
        attend_backward(problem, sums, *rows, k_BGKD, v_BGKE, *results, mine, keys)
        return sums.finish()
    dq, inputs = Sum.empty(q_BHQD), Sums.of_inputs(problem)

    def add_share(hop: int, block_N: Tensor, total_N: Tensor) -> None:
        k, v = unpack(block_N, k_BGKD, v_BGKE)
        dk, dv = map(Sum.begun, unpack(total_N, k, v))
        keys = problem.k_runs(ranks.neighbour(-hop))
        attend_backward(problem, Sums(dq, dk, dv, inputs), *rows, k, v, *results, mine, keys)

    block_N = pack(k_BGKD, v_BGKE)
    total_N = torch.zeros_like(block_N, dtype=accumulation_dtype(k_BGKD.dtype))
    for hop in range(ranks.size):
        add_share(hop, block_N, total_N)
        total_N = _pass_on(problem, f"backward: dK/dV, hop {hop + 1}", total_N)
        if hop < ranks.size - 1:
            block_N = _pass_on(problem, f"backward: K/V, hop {hop + 1}", block_N)
    dk, dv = unpack(total_N, k_BGKD, v_BGKE)
    return Gradients(dq.finish(), dk, dv, inputs)


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
