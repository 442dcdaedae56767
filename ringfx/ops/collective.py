"""All keys and values gathered at once, then one attention of the local queries.

One all-gather before the compute in forward; the same in backward, and one reduce-scatter of dK and
dV after it. Memory holds all of K and V.

Shapes: B batch, H query heads, G key/value heads, S all tokens, D and E the head dims of q, k
and v, P ranks, N all elements of a block.
"""

from __future__ import annotations

import torch

from ringfx.layout import Layout
from ringfx.ops.blocks import pack, unpack
from ringfx.ops.local import Gradients, Output, attend, attend_backward
from ringfx.ops.pieces import Run
from ringfx.ops.problem import Problem

__all__ = ["backward", "forward"]

Tensor = torch.Tensor


def forward(
    problem: Problem, q_BHQD: Tensor, k_BGKD: Tensor, v_BGKE: Tensor
) -> tuple[Tensor, Tensor]:
    """The output of the local queries over all keys and its logsumexp."""
    output = Output(q_BHQD, v_BGKE.shape[-1])
    k_BGSD, v_BGSE = _gather(problem, "forward: all-gather of K/V", k_BGKD, v_BGKE)
    mine = problem.q_runs(problem.ranks.rank)
    attend(problem, output, q_BHQD, k_BGSD, v_BGSE, mine, _all_keys(problem))
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
    k_BGSD, v_BGSE = _gather(problem, "backward: all-gather of K/V", k_BGKD, v_BGKE)
    whole = Gradients.zeros(problem, q_BHQD, k_BGSD, v_BGSE)
    mine, keys = problem.q_runs(ranks.rank), _all_keys(problem)
    attend_backward(
        problem, whole, dout_BHQE, q_BHQD, k_BGSD, v_BGSE, out_BHQE, lse_BHQ, mine, keys
    )
    layout = problem.kv_layout
    parts_PN = torch.stack(
        [
            pack(_of_rank(whole.dk_BGKD, layout, r), _of_rank(whole.dv_BGKE, layout, r))
            for r in range(ranks.size)
        ]
    )
    mine_N = ranks.reduce_scatter("backward: reduce-scatter of dK/dV", parts_PN)
    dk_BGKD, dv_BGKE = unpack(mine_N, k_BGKD, v_BGKE)
    return Gradients(whole.dq_BHQD, dk_BGKD, dv_BGKE, whole.inputs)


def _gather(
    problem: Problem, operation: str, k_BGKD: Tensor, v_BGKE: Tensor
) -> tuple[Tensor, Tensor]:
    """All K and V, in order of position, padding at the end."""
    blocks_PN = problem.ranks.all_gather(operation, pack(k_BGKD, v_BGKE))
    layout = problem.kv_layout
    whole = []
    for which, local in enumerate((k_BGKD, v_BGKE)):
        B, G, _, D = local.shape
        whole_BGSD = local.new_empty(B, G, layout.padded_length, D)
        for rank in range(layout.world_size):
            block = unpack(blocks_PN[rank], k_BGKD, v_BGKE)[which]
            for i, start in enumerate(layout.chunk_starts(rank)):
                size = layout.chunk_length
                whole_BGSD[:, :, start : start + size] = block[:, :, i * size : (i + 1) * size]
        whole.append(whole_BGSD)
    return whole[0], whole[1]


def _all_keys(problem: Problem) -> tuple[Run, ...]:
    return (Run(0, 0, problem.spec.kv_len),)


def _of_rank(whole_BGSD: Tensor, layout: Layout, rank: int) -> Tensor:
    """A rank's tokens of a tensor in order of position."""
    size = layout.chunk_length
    return torch.cat([whole_BGSD[:, :, s : s + size] for s in layout.chunk_starts(rank)], dim=2)
