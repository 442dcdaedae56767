"""The ring with its messages hidden behind the tiles.

While a block is worked on, the next one is already on its way here and this one on its way to the
next rank. In the backward the gradients of a block follow it one hop behind: what the previous
ranks have added arrives while this rank computes its own share.

Blocks that the mask empties for everyone are not sent at all: the ring ends at the last hop that
any rank needs, which all ranks derive from the positions alone and so agree on.

Shapes: B batch, H query heads, G key/value heads, D and E the head dims of q, k and of v, N all
elements of a block.
"""

from __future__ import annotations

import torch

from ringfx.ops.blocks import pack, unpack
from ringfx.ops.local import Gradients, Output, attend, attend_backward
from ringfx.ops.pieces import Tiling, pieces
from ringfx.ops.problem import Problem
from ringfx.ops.ranks import Exchange

__all__ = ["backward", "forward", "hops_needed"]

Tensor = torch.Tensor


def hops_needed(problem: Problem, heads: int, batch: int) -> int:
    """How many blocks each rank must see, its own included: the same number on all ranks.

    Only positions count, never the captured tensors, which could differ between ranks.
    """
    size = problem.ranks.size
    coarse = Tiling(masked=1 << 62)
    for hop in reversed(range(1, size)):
        for rank in range(size):
            found = pieces(
                problem.spec,
                problem.q_runs(rank),
                problem.k_runs((rank - hop) % size),
                coarse,
                b=(0, batch),
                h=(0, heads),
                inputs=None,
            )
            if next(found, None) is not None:
                return hop + 1
    return 1


def _send_on(problem: Problem, operation: str, block_N: Tensor) -> Exchange:
    ranks = problem.ranks
    return ranks.exchange(
        operation,
        send=block_N,
        to=ranks.neighbour(1),
        receive=torch.empty_like(block_N),
        source=ranks.neighbour(-1),
    )


def forward(
    problem: Problem, q_BHQD: Tensor, k_BGKD: Tensor, v_BGKE: Tensor
) -> tuple[Tensor, Tensor]:
    """The output of the local queries over all keys and its logsumexp."""
    ranks = problem.ranks
    output = Output(q_BHQD, v_BGKE.shape[-1])
    hops = hops_needed(problem, q_BHQD.shape[1], q_BHQD.shape[0])
    block_N = pack(k_BGKD, v_BGKE) if hops > 1 else None
    k, v = k_BGKD, v_BGKE
    for hop in range(hops):
        coming: Exchange | None = None
        if block_N is not None and hop < hops - 1:
            coming = _send_on(problem, f"forward: K/V, hop {hop + 1}", block_N)
        owner = ranks.neighbour(-hop)
        attend(problem, output, q_BHQD, k, v, problem.q_runs(ranks.rank), problem.k_runs(owner))
        if coming is not None:
            block_N = coming.wait()
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
    hops = hops_needed(problem, q_BHQD.shape[1], q_BHQD.shape[0])
    mine = Gradients.zeros(problem, q_BHQD, k_BGKD, v_BGKE)
    block_N = pack(k_BGKD, v_BGKE) if hops > 1 else None
    k, v = k_BGKD, v_BGKE
    following: Exchange | None = None
    for hop in range(hops):
        coming: Exchange | None = None
        if block_N is not None and hop < hops - 1:
            coming = _send_on(problem, f"backward: K/V, hop {hop + 1}", block_N)
        share = mine if hop == 0 else Gradients.zeros_like_keys(mine)
        attend_backward(
            problem,
            share,
            dout_BHQE,
            q_BHQD,
            k,
            v,
            out_BHQE,
            lse_BHQ,
            problem.q_runs(ranks.rank),
            problem.k_runs(ranks.neighbour(-hop)),
        )
        if coming is not None:
            block_N = coming.wait()
            k, v = unpack(block_N, k_BGKD, v_BGKE)
        if hop == 0:
            # The owner's share stays at home; what the others add comes back to it at the end.
            continue
        share_N = pack(share.dk_BGKD, share.dv_BGKE)
        if following is not None:
            share_N.add_(following.wait())
        if hop < hops - 1:
            following = _send_on(problem, f"backward: dK/dV, hop {hop + 1}", share_N)
    if hops > 1:
        home_N = ranks.exchange(
            "backward: dK/dV, home",
            send=share_N,
            to=ranks.neighbour(1 - hops),
            receive=torch.empty_like(share_N),
            source=ranks.neighbour(hops - 1),
        ).wait()
        dk, dv = unpack(home_N, mine.dk_BGKD, mine.dv_BGKE)
        mine.dk_BGKD.add_(dk)
        mine.dv_BGKE.add_(dv)
    return mine
