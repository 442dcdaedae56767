"""Heads for tokens: an all-to-all gives each rank all tokens of its share of the heads.

Each rank then runs plain attention over whole sequences, and a second all-to-all brings the output
back (Jacobs et al., DeepSpeed-Ulysses). Where there are fewer K/V heads than ranks, or they do not
divide, each is repeated until they do; the gradients of the copies are added.

Shapes: B batch, H query heads, G key/value heads, Q local tokens, S all tokens (padded), D any head
dim, P ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from ringfx.comm.process_group import Ranks
from ringfx.cost_model.prediction.footprint import Calls, sums_forward
from ringfx.cost_model.prediction.formulas import Phase, whole_seconds
from ringfx.cost_model.prediction.profile import Direction, Profile
from ringfx.cost_model.prediction.rank_share import Local
from ringfx.cost_model.prediction.strategy import Refusal, Strategy, refuse_dropout
from ringfx.cost_model.prediction.terms import message_seconds
from ringfx.cost_model.prediction.work import Work, whole_work
from ringfx.ir.dilation import AnyLayout
from ringfx.ir.kernel_table import Pick
from ringfx.ir.values import AttentionSite
from ringfx.ops.kernels.logsumexp import digits
from ringfx.ops.tiling.attention_call import Problem
from ringfx.ops.tiling.merge import Gradients
from ringfx.strategies import local as one_rank

__all__ = ["ULYSSES"]

Tensor = torch.Tensor


def _to_heads(ranks: Ranks, layout: AnyLayout, operation: str, x_BHQD: Tensor) -> Tensor:
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


def _to_tokens(ranks: Ranks, layout: AnyLayout, operation: str, x_BHSD: Tensor) -> Tensor:
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
    """All tokens of this rank's share of the heads, as one rank alone computes them."""
    ranks = problem.ranks
    alone = Ranks(0, 1, None, ranks.layer)
    share = heads // ranks.size
    return replace(problem, ranks=alone, layout="contiguous", first_head=ranks.rank * share)


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
    out, lse = one_rank.forward(_local_problem(problem, H), q, k, v)
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
    return one_rank.backward(_local_problem(problem, H), dout, q, k, v, out, lse)


def _repeat(x_BGKD: Tensor, copies: int) -> Tensor:
    return x_BGKD if copies == 1 else x_BGKD.repeat_interleave(copies, dim=1)


def _add_copies(x_BHKD: Tensor, copies: int) -> Tensor:
    return x_BHKD if copies == 1 else x_BHKD.unflatten(1, (-1, copies)).sum(2)


# --- where it can run -----------------------------------------------------------------------------


def admits(site: AttentionSite, world_size: int) -> Refusal | None:
    refusal = refuse_dropout(site, world_size)
    if refusal is None and site.row_bytes:
        refusal = Refusal(
            reason='"ulysses" computes all queries of some heads, and each rank has only its own '
            "queries' rows of the scores that are added to them",
            remedy='use "production" or "collective"',
        )
    if refusal is not None or site.heads % world_size == 0:
        return refusal
    divisors = [str(p) for p in range(2, site.heads + 1) if site.heads % p == 0]
    ranks = f"a number of ranks that divides them ({', '.join(divisors)})" if divisors else "1 rank"
    return Refusal(
        reason=f'"ulysses" needs heads % ranks == 0; here {site.heads} heads, {world_size} ranks',
        remedy=f'use {ranks}, or "production"',
    )


# --- what it costs -------------------------------------------------------------------------------


def time(local: Local, profile: Profile, direction: Direction, pick: Pick) -> Phase:
    """Tokens for heads, whole sequences at once, and back; K/V heads repeated until p divides them.

    forward     t + x(q) + x(k) + x(v) + x(out, lse)
    backward    t + x(q, out, dout, lse) + x(k) + x(v) + x(dq) + x(dk) + x(dv)
    """
    p = local.world_size
    compute_s = whole_seconds(local, profile, pick, direction, 1 / p)
    messages = _exchanged_forward(local) if direction == "forward" else _exchanged_backward(local)
    sent = (p - 1) / p
    messages_s = sum(message_seconds(profile, "all_to_all", p, sent * size) for size in messages)
    return Phase(compute_s=compute_s, communication_s=messages_s, exposed_s=messages_s)


def _exchanged_forward(local: Local) -> Sequence[int]:
    """Bytes of each all-to-all: q, k, v in their dtype; output and logsumexp in float32."""
    back = (local.out_items + local.rows) * local.accumulator_bytes
    return local.q_items * local.itemsize, *_exchanged_kv(local, local.itemsize), back


def _exchanged_backward(local: Local) -> Sequence[int]:
    e, a = local.itemsize, local.accumulator_bytes
    there = (local.q_items * e, local.out_items * e, local.out_items * e, local.rows * a)
    back = (local.q_items * a, *_exchanged_kv(local, a))
    return *there, *_exchanged_kv(local, e), *back


def _exchanged_kv(local: Local, size: int) -> tuple[int, int]:
    copies = _copies(local.site.kv_heads, local.world_size)
    return copies * local.k_items * size, copies * local.v_items * size


def memory(local: Local, calls: Calls) -> Iterator[int]:
    """Bytes held, moment by moment."""
    return (_forward_moments if calls.direction == "forward" else _backward_moments)(local, calls)


def _forward_moments(local: Local, calls: Calls) -> Iterator[int]:
    """(q + c kv) e by heads + (o + r) a, and the call over whole sequences or both once more."""
    kv = _copies(local.site.kv_heads, local.world_size) * local.kv_items
    by_heads = (local.q_items + kv) * local.itemsize
    held = by_heads + sums_forward(local)
    yield held + calls.of(_works(local), 1 / local.world_size)
    yield held + sums_forward(local)


def _works(local: Local) -> Iterator[Work]:
    """Whole sequences, of each part of a dilated attention."""
    return (whole_work(part.site.spec) for _, part in local.parts)


def _backward_moments(local: Local, calls: Calls) -> Iterator[int]:
    """(q + 2 o + c kv) e + r a by heads + (q + c kv) a, and the call over whole sequences.

    Then (q + c kv) a by heads, as much by tokens, and what leaves and comes of dq, 2 q a / p.
    """
    kv, a = _copies(local.site.kv_heads, local.world_size) * local.kv_items, local.accumulator_bytes
    by_heads = (local.q_items + 2 * local.out_items + kv) * local.itemsize + local.rows * a
    sums = (local.q_items + kv) * a
    call = calls.of(_works(local), 1 / local.world_size)
    yield by_heads + sums + call
    yield 2 * sums + 2 * local.q_items * a // local.world_size


ULYSSES = Strategy(
    name="ulysses",
    gloss="all-to-all of heads",
    summary="all-to-all of heads for tokens, fused attention of whole sequences, and back",
    forward=forward,
    backward=backward,
    time=time,
    memory=memory,
    admits=admits,
    own_queries=False,
)
