"""Heads for tokens: an all-to-all gives each rank all tokens of its share of the heads.

Each rank then runs plain attention over whole sequences, and a second all-to-all brings the output
back (Jacobs et al., DeepSpeed-Ulysses). Where there are fewer K/V heads than ranks, or they do not
divide, each is repeated until they do; the gradients of the copies are added.

Shapes: B batch, H query heads, G key/value heads, Q local tokens, S all tokens (padded), D any head
dim, P ranks.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from ringfx.comm.process_group import Ranks
from ringfx.ir.layout import Layout
from ringfx.ops.kernels.logsumexp import digits
from ringfx.ops.tiling.attention_call import Problem
from ringfx.ops.tiling.merge import Gradients, Output, Sums, attend, attend_backward
from ringfx.ops.tiling.pieces import Run

__all__ = ["backward", "forward"]

Tensor = torch.Tensor


def _to_heads(ranks: Ranks, layout: Layout, operation: str, x_BHQD: Tensor) -> Tensor:
    """[B, H, Q, D] on each rank -> [B, H/P, S, D]: all tokens, in order of position."""
    B, H, _, D = x_BHQD.shape
    heads = H // ranks.size
    whole_BHSD = x_BHQD.new_empty(B, heads, layout.padded_length, D)

    def of_heads(rank: int) -> Tensor:
        return x_BHQD[:, rank * heads : (rank + 1) * heads]

    def place(rank: int, part_BHQD: Tensor) -> None:
        for there, here in layout.chunks(rank):
            whole_BHSD[:, :, there] = part_BHQD[:, :, here]

    place(ranks.rank, of_heads(ranks.rank))
    for rank, part_BHQD in ranks.iter_all_to_all(operation, of_heads):
        place(rank, part_BHQD)
    return whole_BHSD


def _to_tokens(ranks: Ranks, layout: Layout, operation: str, x_BHSD: Tensor) -> Tensor:
    """The inverse: [B, H/P, S, D] -> [B, H, Q, D]."""
    B, heads, _, D = x_BHSD.shape
    local_BHQD = x_BHSD.new_empty(B, ranks.size * heads, layout.local_length, D)

    def of_tokens(rank: int) -> Tensor:
        part_BHQD = x_BHSD.new_empty(B, heads, layout.local_length, D)
        for there, here in layout.chunks(rank):
            part_BHQD[:, :, here] = x_BHSD[:, :, there]
        return part_BHQD

    def place(rank: int, part_BHQD: Tensor) -> None:
        local_BHQD[:, rank * heads : (rank + 1) * heads] = part_BHQD

    place(ranks.rank, of_tokens(ranks.rank))
    for rank, part_BHQD in ranks.iter_all_to_all(operation, of_tokens):
        place(rank, part_BHQD)
    return local_BHQD


def _copies(kv_heads: int, ranks: int) -> int:
    """How often each K/V head is repeated so that the ranks divide them."""
    return math.lcm(kv_heads, ranks) // kv_heads


def _local_problem(problem: Problem, heads: int) -> Problem:
    share = heads // problem.ranks.size
    return replace(problem, first_head=problem.ranks.rank * share)


def _runs(problem: Problem) -> tuple[tuple[Run, ...], tuple[Run, ...]]:
    return (Run(0, 0, problem.spec.q_len),), (Run(0, 0, problem.spec.kv_len),)


def forward(
    problem: Problem, q_BHQD: Tensor, k_BGKD: Tensor, v_BGKE: Tensor
) -> tuple[Tensor, Tensor]:
    """The output of the local queries over all keys and its logsumexp."""
    both = _to_tokens(
        problem.ranks,
        problem.q_layout,
        "forward: all-to-all of the output",
        _attended(problem, q_BHQD, k_BGKD, v_BGKE),
    )
    E = v_BGKE.shape[-1]
    lse_BHQ = both[..., E:].to(problem.logsumexp_dtype(q_BHQD.dtype)).sum(-1)
    return both[..., :E].contiguous(), lse_BHQ


def _attended(problem: Problem, q_BHQD: Tensor, k_BGKD: Tensor, v_BGKE: Tensor) -> Tensor:
    """Of this rank's heads the output for all tokens, and in last columns its logsumexp."""
    ranks, H, G = problem.ranks, q_BHQD.shape[1], k_BGKD.shape[1]
    copies = _copies(G, ranks.size)
    q = _to_heads(ranks, problem.q_layout, "forward: all-to-all of q", q_BHQD)
    k, v = (
        _to_heads(ranks, problem.kv_layout, f"forward: all-to-all of {name}", _repeat(x, copies))
        for name, x in (("k", k_BGKD), ("v", v_BGKE))
    )
    output = Output.empty(problem, q, v.shape[-1])
    attend(_local_problem(problem, H), output, q, k, v, *_runs(problem))
    out, lse = output.finish()
    return torch.cat([out, torch.stack(digits(lse, out.dtype), dim=-1)], dim=-1)


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
    ranks, copies = problem.ranks, _copies(k_BGKD.shape[1], problem.ranks.size)
    found = _of_own_heads(problem, dout_BHQE, q_BHQD, k_BGKD, v_BGKE, out_BHQE, lse_BHQ)
    dq = _to_tokens(ranks, problem.q_layout, "backward: all-to-all of dq", found.dq_BHQD)
    dk, dv = (
        _to_tokens(ranks, problem.kv_layout, f"backward: all-to-all of {name}", x)
        for name, x in (("dk", found.dk_BGKD), ("dv", found.dv_BGKE))
    )
    return Gradients(dq, _add_copies(dk, copies), _add_copies(dv, copies), found.inputs)


def _of_own_heads(
    problem: Problem,
    dout_BHQE: Tensor,
    q_BHQD: Tensor,
    k_BGKD: Tensor,
    v_BGKE: Tensor,
    out_BHQE: Tensor,
    lse_BHQ: Tensor,
) -> Gradients:
    """Those of all tokens, of this rank's heads."""
    ranks, H, G = problem.ranks, q_BHQD.shape[1], k_BGKD.shape[1]
    copies = _copies(G, ranks.size)

    def rows(name: str, x: Tensor) -> Tensor:
        return _to_heads(ranks, problem.q_layout, f"backward: all-to-all of {name}", x)

    q, out, dout = rows("q", q_BHQD), rows("the output", out_BHQE), rows("dout", dout_BHQE)
    lse = rows("the logsumexp", lse_BHQ[..., None])[..., 0]
    k, v = (
        _to_heads(ranks, problem.kv_layout, f"backward: all-to-all of {name}", _repeat(x, copies))
        for name, x in (("k", k_BGKD), ("v", v_BGKE))
    )
    sums = Sums.empty(problem, q, k, v)
    attend_backward(_local_problem(problem, H), sums, dout, q, k, v, out, lse, *_runs(problem))
    return sums.finish()


def _repeat(x_BGKD: Tensor, copies: int) -> Tensor:
    return x_BGKD if copies == 1 else x_BGKD.repeat_interleave(copies, dim=1)


def _add_copies(x_BHKD: Tensor, copies: int) -> Tensor:
    return x_BHKD if copies == 1 else x_BHKD.unflatten(1, (-1, copies)).sum(2)
