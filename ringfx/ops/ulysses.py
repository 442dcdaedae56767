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

from ringfx.layout import Layout
from ringfx.ops.local import Gradients, Output, Sums, attend, attend_backward
from ringfx.ops.pieces import Run
from ringfx.ops.problem import Problem
from ringfx.ops.ranks import Ranks

__all__ = ["backward", "forward"]

Tensor = torch.Tensor


def _to_heads(ranks: Ranks, layout: Layout, operation: str, x_BHQD: Tensor) -> Tensor:
    """[B, H, Q, D] on each rank -> [B, H/P, S, D]: all tokens, in order of position."""
    P = ranks.size
    B, H, Q, D = x_BHQD.shape
    parts = x_BHQD.reshape(B, P, H // P, Q, D).movedim(1, 0)
    received = ranks.all_to_all(operation, parts)  # [P, B, H/P, Q, D], by owner of the tokens
    whole = x_BHQD.new_empty(B, H // P, layout.padded_length, D)
    size = layout.chunk_length
    for rank in range(P):
        for i, start in enumerate(layout.chunk_starts(rank)):
            whole[:, :, start : start + size] = received[rank, :, :, i * size : (i + 1) * size]
    return whole


def _to_tokens(ranks: Ranks, layout: Layout, operation: str, x_BHSD: Tensor) -> Tensor:
    """The inverse: [B, H/P, S, D] -> [B, H, Q, D]."""
    B, heads, _, D = x_BHSD.shape
    size = layout.chunk_length
    parts = x_BHSD.new_empty(ranks.size, B, heads, layout.local_length, D)
    for rank in range(ranks.size):
        for i, start in enumerate(layout.chunk_starts(rank)):
            parts[rank, :, :, i * size : (i + 1) * size] = x_BHSD[:, :, start : start + size]
    received = ranks.all_to_all(operation, parts)
    return received.movedim(0, 1).reshape(B, ranks.size * heads, layout.local_length, D)


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
    ranks, H, G = problem.ranks, q_BHQD.shape[1], k_BGKD.shape[1]
    copies = _copies(G, ranks.size)
    q = _to_heads(ranks, problem.q_layout, "forward: all-to-all of q", q_BHQD)
    k, v = (
        _to_heads(ranks, problem.kv_layout, f"forward: all-to-all of {name}", _repeat(x, copies))
        for name, x in (("k", k_BGKD), ("v", v_BGKE))
    )
    output = Output.empty(q, v.shape[-1])
    attend(_local_problem(problem, H), output, q, k, v, *_runs(problem))
    out, lse = output.finish()
    both = torch.cat([out, lse[..., None]], dim=-1)
    local = _to_tokens(ranks, problem.q_layout, "forward: all-to-all of the output", both)
    return local[..., :-1].contiguous(), local[..., -1].contiguous()


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
    found = sums.finish()
    dq = _to_tokens(ranks, problem.q_layout, "backward: all-to-all of dq", found.dq_BHQD)
    dk, dv = (
        _to_tokens(ranks, problem.kv_layout, f"backward: all-to-all of {name}", x)
        for name, x in (("dk", found.dk_BGKD), ("dv", found.dv_BGKE))
    )
    return Gradients(dq, _add_copies(dk, copies), _add_copies(dv, copies), sums.inputs)


def _repeat(x_BGKD: Tensor, copies: int) -> Tensor:
    return x_BGKD if copies == 1 else x_BGKD.repeat_interleave(copies, dim=1)


def _add_copies(x_BHKD: Tensor, copies: int) -> Tensor:
    return (
        x_BHKD if copies == 1 else torch.stack([x_BHKD[:, i::copies] for i in range(copies)]).sum(0)
    )
