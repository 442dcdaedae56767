"""A strategy of one's own: K and V gathered in two halves, the second under way behind the first.

    torchrun --nproc-per-node 2 -m examples.own_strategy

compares a model that runs with it with the unsplit model, and prints the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import ringfx
from examples.on_ranks import largest_difference, on_ranks
from ringfx.cost_model.prediction.footprint import Calls, output_moments, sums_forward
from ringfx.cost_model.prediction.formulas import Phase, exposed_seconds, work_seconds
from ringfx.cost_model.prediction.profile import Profile, load_profile
from ringfx.cost_model.prediction.profile_rows import Direction
from ringfx.cost_model.prediction.rank_share import Local
from ringfx.cost_model.prediction.terms import message_seconds
from ringfx.cost_model.prediction.work import gathered_work
from ringfx.ir.kernel_table import Pick
from ringfx.ops.tiling.attention_call import Problem
from ringfx.ops.tiling.head_groups import HeadGroup, head_groups
from ringfx.ops.tiling.merge import Output, attend
from ringfx.ops.tiling.pieces import Run
from ringfx.strategies.packing import pack, unpack

COLLECTIVE = ringfx.STRATEGIES["collective"]


def forward(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """q [B, H, Q, D], k [B, G, K, D], v [B, G, K, E] of this rank -> its output and logsumexp."""
    output = Output.empty(problem, q, v.shape[-1])
    mine, keys = problem.q_runs(problem.ranks.rank), (Run(0, 0, problem.spec.kv_len),)
    halves = head_groups(q, k, v, least_bytes=1, most=2)
    arrived = start(problem, halves[0], k, v)
    for half, following in zip(halves, (*halves[1:], None), strict=True):
        all_k, all_v = arrived()
        if following is not None:
            arrived = start(problem, following, k, v)  # travels while this half is computed
        part = output.of_heads(half.q)
        attend(problem.heads(half), part, q[:, half.q], all_k, all_v, mine, keys)
        part.finish()
    return output.out_BHQE, output.lse_BHQ


def start(
    problem: Problem, half: HeadGroup, k: Tensor, v: Tensor
) -> Callable[[], tuple[Tensor, Tensor]]:
    """Sends a half of the heads to every other rank; what it returns waits for theirs."""
    ranks, layout = problem.ranks, problem.kv_layout
    k, v = k[:, half.kv], v[:, half.kv]
    block = pack(k, v)
    exchanges = [
        ranks.exchange(
            "forward: K/V of half the heads", send=block, to=ranks.neighbour(n),
            receive=torch.empty_like(block), source=ranks.neighbour(-n), tag=half.kv.start,
        )
        for n in range(1, ranks.size)
    ]  # fmt: skip

    def arrived() -> tuple[Tensor, Tensor]:
        blocks = [block, *(exchange.wait() for exchange in exchanges)]
        all_k, all_v = (x.new_zeros(*x.shape[:2], layout.padded_length, x.shape[3]) for x in (k, v))
        for n, received in enumerate(blocks):
            for whole, part in zip((all_k, all_v), unpack(received, k, v), strict=True):
                for there, here in layout.chunks(ranks.neighbour(-n)):
                    whole[:, :, there] = part[:, :, here]
        return all_k, all_v

    return arrived


def time(local: Local, profile: Profile, direction: Direction, pick: Pick) -> Phase:
    """With t the kernel's time, m the gather of a half, forward in N = 2 halves:

    forward     m + max(t/2, m) + t/2
    """
    if direction == "backward":
        return COLLECTIVE.time(local, profile, direction, pick)
    p, halves, site = local.world_size, local.groups(1, 2), local.site
    works = gathered_work(site.spec, local.layout, p)
    kernel_s = max(work_seconds(profile, pick, site, w, direction, halves) for w in works)
    received = (p - 1) * local.kv_bytes // halves
    gather_s = message_seconds(profile, "all_gather", p, received)
    hidden_s = exposed_seconds(profile, kernel_s / halves, gather_s, received)
    return Phase(
        compute_s=kernel_s,
        communication_s=halves * gather_s,
        exposed_s=gather_s + (halves - 1) * hidden_s,
    )


def memory(local: Local, calls: Calls) -> Iterator[int]:
    """Forward: the output's sums, one half of all K and V, the other as it arrives, and a call."""
    if calls.direction == "backward":
        yield from COLLECTIVE.memory(local, calls)
        return
    p, halves = local.world_size, local.groups(1, 2)
    held = sums_forward(local) + 2 * p * local.kv_bytes // halves
    yield held + calls.of(gathered_work(local.site.spec, local.layout, p), 1 / halves)
    yield from output_moments(local)


ALL_GATHER_HALVES = ringfx.Strategy(
    name="all_gather_halves",
    gloss="all-gather of K/V in two halves",
    summary="the second half of the heads is gathered while the first is computed",
    forward=forward,
    backward=COLLECTIVE.backward,
    time=time,
    memory=memory,
    all_keys=True,
)
STRATEGIES = ringfx.STRATEGIES | {"all_gather_halves": ALL_GATHER_HALVES}


class Attention(nn.Module):
    """One layer of causal attention over x [B, S, C]; several queries share a head of K and V."""

    def __init__(self, channels: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.head_dim = channels // heads
        self.q, self.out = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.kv = nn.Linear(channels, 2 * kv_heads * self.head_dim)

    def forward(self, x: Tensor) -> Tensor:
        both = self.q(x), self.kv(x)
        q, kv = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in both)
        k, v = kv.chunk(2, dim=1)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        result: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return result


def compared() -> tuple[float, ringfx.Plan]:
    """On every rank: the largest relative difference from the unsplit model, and the plan."""
    torch.manual_seed(0)
    model, x = Attention(32, 4, 2).double(), torch.randn(2, 41, 32, dtype=torch.float64)
    split = ringfx.optimize(
        model, strategies=STRATEGIES, strategy="all_gather_halves", compiler="aot_eager"
    )
    difference, plan = largest_difference(model, split, x), split.plan
    assert isinstance(plan, ringfx.Plan)
    return difference, plan


PROFILE, RANKS = load_profile("h100-sxm-published", device="cuda"), 8
SHORT, LONG = 4096, 65_536
"""Tokens: of so few, fewer messages are worth more; of so many, the kernel hides half of them."""


def planned(seq_len: int) -> ringfx.Plan:
    """What is chosen on eight H100, without running it."""
    with torch.device("meta"):
        model, x = Attention(4096, 32, 2).bfloat16(), torch.empty(1, seq_len, 4096).bfloat16()
    return ringfx.plan(model, (x,), world_size=RANKS, profile=PROFILE.name, strategies=STRATEGIES)


if __name__ == "__main__":
    if on_ranks(compared):
        for length in (SHORT, LONG):
            print(planned(length))
