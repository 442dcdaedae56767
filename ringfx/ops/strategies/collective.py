"""All keys and values gathered at once, then one attention of the local queries.

One all-gather before the compute in forward; the same in backward, and one reduce-scatter of dK and
dV after it. Memory holds all of K and V; where that is much, of some heads at a time.

Shapes: B batch, H query heads, G key/value heads, S all tokens, D and E the head dims of q, k and
v, P ranks, N all elements of a block.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ringfx.ops.strategies.packing import pack, unpack
from ringfx.ops.tiling.attention_call import Problem
from ringfx.ops.tiling.head_groups import HeadGroup, head_groups
from ringfx.ops.tiling.merge import Gradients, Output, Sum, Sums, attend, attend_backward
from ringfx.ops.tiling.pieces import Run

__all__ = ["GATHERED_BYTES", "backward", "forward"]

Tensor = torch.Tensor

GATHERED_BYTES = 256 << 20
"""K and V of all ranks that are held at once, about: beyond it heads are gathered group by group,
each still a message far above the size at which links reach their bandwidth."""


def _groups(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[HeadGroup, ...]:
    return head_groups(q, k, v, least_bytes=GATHERED_BYTES // problem.ranks.size)


def forward(
    problem: Problem, q_BHQD: Tensor, k_BGKD: Tensor, v_BGKE: Tensor
) -> tuple[Tensor, Tensor]:
    """The output of the local queries over all keys and its logsumexp."""
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
