"""What one attention costs under each strategy: closed forms over a profile's constants.

With p ranks, n = S/p local tokens, b batch, h heads, g K/V heads, head dims d (q, k) and e (v), and
w the share of (query, key) pairs that a rank computes, one hop of a ring computes b h n^2 w pairs:

    forward    F(pairs) = 2 (d + e) pairs      two products: q k^T, P v
    backward   F(pairs) = 2 (3d + 2e) pairs    five: q k^T again, dP = dO v^T, dV, dQ, dK
    kernel     t = call + F / rate             (``kernel_seconds``)
    message    t = steps * latency + bytes / bandwidth        (``message_seconds``)

A strategy arranges these: what overlaps costs the larger of both, what does not costs the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch

from ringfx.cost_model.profile import Collective, Direction, Profile
from ringfx.errors import ProfileError
from ringfx.layout import Layout, LayoutKind
from ringfx.passes.values import AttentionSite

__all__ = ["FORMULAS", "Phase", "Prediction", "kernel_seconds", "message_seconds", "predict"]

ACCUMULATOR_BYTES = 4
"""Outputs and gradients are accumulated, and gradients of K and V travel, in float32."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Seconds of one direction on one rank; ``exposed_s`` is communication nothing hides."""

    compute_s: float = 0.0
    communication_s: float = 0.0
    exposed_s: float = 0.0

    @property
    def total_s(self) -> float:
        return self.compute_s + self.exposed_s


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Time and memory of one attention under one strategy, on the slowest rank."""

    strategy: str
    kernel: str
    forward: Phase
    backward: Phase
    """All zero where nothing trains."""
    saved_bytes: int
    workspace_bytes: int

    @property
    def forward_ms(self) -> float:
        return 1e3 * self.forward.total_s

    @property
    def backward_ms(self) -> float:
        return 1e3 * self.backward.total_s

    @property
    def total_ms(self) -> float:
        return self.forward_ms + self.backward_ms

    @property
    def compute_ms(self) -> float:
        return 1e3 * (self.forward.compute_s + self.backward.compute_s)

    @property
    def communication_ms(self) -> float:
        return 1e3 * (self.forward.communication_s + self.backward.communication_s)

    @property
    def exposed_ms(self) -> float:
        return 1e3 * (self.forward.exposed_s + self.backward.exposed_s)


@dataclass(frozen=True, kw_only=True)
class Local:
    """One rank's share of an attention: tokens, and bytes of its tensors."""

    site: AttentionSite
    world_size: int
    q_len: int
    kv_len: int

    @property
    def itemsize(self) -> int:
        dtype: torch.dtype = getattr(torch, self.site.dtype)
        return dtype.itemsize

    @property
    def q_items(self) -> int:
        return self.site.batch * self.site.heads * self.q_len * self.site.head_dim

    @property
    def out_items(self) -> int:
        return self.site.batch * self.site.heads * self.q_len * self.site.v_head_dim

    @property
    def kv_items(self) -> int:
        """Elements of K and V together."""
        dims = self.site.head_dim + self.site.v_head_dim
        return self.site.batch * self.site.kv_heads * self.kv_len * dims

    @property
    def row_bytes(self) -> int:
        """The logsumexp, float32."""
        return self.site.batch * self.site.heads * self.q_len * ACCUMULATOR_BYTES

    @property
    def saved_bytes(self) -> int:
        """q, k, v, output and logsumexp, kept for backward."""
        items = self.q_items + self.kv_items + self.out_items
        return items * self.itemsize + self.row_bytes if self.site.trains else 0


def local_share(site: AttentionSite, world_size: int) -> Local:
    """The tokens of one rank under the layout that the site's balance asks for."""
    kind = layout_kind(site)
    return Local(
        site=site,
        world_size=world_size,
        q_len=Layout(kind, site.q_len, world_size).local_length,
        kv_len=Layout(kind, site.kv_len, world_size).local_length,
    )


# --- terms ------------------------------------------------------------------------------------


def kernel_seconds(
    profile: Profile, kernel: str, site: AttentionSite, pairs: float, direction: Direction
) -> float:
    """Time of one kernel call over ``pairs`` (query, key) pairs of all heads and batch rows."""
    row = profile.kernel(kernel, site.dtype, direction)
    flops = flops_per_pair(site.head_dim, site.v_head_dim, direction) * pairs
    return row.call_us / 1e6 + flops / (row.gflops * 1e9)


def flops_per_pair(head_dim: int, v_head_dim: int, direction: Direction) -> int:
    """Two products forward; five backward, since the scores are computed again."""
    if direction == "forward":
        return 2 * (head_dim + v_head_dim)
    return 2 * (3 * head_dim + 2 * v_head_dim)


def message_seconds(
    profile: Profile, operation: Collective, world_size: int, received_bytes: float
) -> float:
    """Time in which one rank receives ``received_bytes`` by that collective."""
    if world_size == 1:
        return 0.0
    row = profile.link(operation, world_size)
    latency_s = message_steps(operation, world_size) * row.latency_us / 1e6
    return latency_s + received_bytes / (row.gbytes_per_s * 1e9)


def message_steps(operation: Collective, world_size: int) -> int:
    """Latencies that follow each other.

    An all-gather and a reduce-scatter go round a ring of p - 1 steps, an all-reduce is both; a send
    has one step, and so has an all-to-all, whose pairs all exchange at once.
    """
    ring = world_size - 1
    return {"send_recv": 1, "all_to_all": 1, "all_reduce": 2 * ring}.get(operation, ring)


def layout_kind(site: AttentionSite) -> LayoutKind:
    """Zigzag where rows keep different numbers of keys, so that every rank has equal work."""
    return "contiguous" if site.balanced else "zigzag"


def hop_pairs(local: Local) -> float:
    """Pairs that a rank computes for one K/V shard: the layout spreads the kept pairs evenly."""
    site = local.site
    return site.batch * site.heads * local.q_len * local.kv_len * site.density


def dense_pairs(local: Local) -> float:
    """Pairs of one K/V shard when masked ones are computed too."""
    return local.site.batch * local.site.heads * local.q_len * local.kv_len


# --- strategies -------------------------------------------------------------------------------

Formula: TypeAlias = Callable[[Local, Profile], Prediction]


def simple(local: Local, profile: Profile) -> Prediction:
    """K/V shards travel round the ring; each hop stores its scores, then waits for the next.

    forward     p t(n^2) + (p-1) m(KV)
    backward    p t(n^2) + (p-1) m(KV) + p m(dKV): gradients travel one hop more, to arrive home
    workspace   two n x n score tensors in float32, K/V in flight, accumulators
    """
    p, kv = local.world_size, local.kv_items
    hop = message_seconds(profile, "send_recv", p, kv * local.itemsize)
    back = message_seconds(profile, "send_recv", p, kv * ACCUMULATOR_BYTES)
    forward_s = (p - 1) * hop
    backward_s = (p - 1) * hop + p * back
    pairs = dense_pairs(local)
    scores = 2 * round(pairs) * ACCUMULATOR_BYTES
    return _prediction(
        local,
        strategy="simple",
        kernel="math",
        forward=Phase(
            compute_s=p * kernel_seconds(profile, "math", local.site, pairs, "forward"),
            communication_s=forward_s,
            exposed_s=forward_s,
        ),
        backward=Phase(
            compute_s=p * kernel_seconds(profile, "math", local.site, pairs, "backward"),
            communication_s=backward_s,
            exposed_s=backward_s,
        ),
        workspace_bytes=scores + ring_buffers(local),
    )


def collective(local: Local, profile: Profile) -> Prediction:
    """K and V are gathered whole, then one kernel call; their gradients are reduce-scattered.

    forward     t(n S) + a(KV)                  a: all-gather of p - 1 shards
    backward    t(n S) + a(KV) + r(dKV)         r: reduce-scatter, float32
    workspace   K and V whole; in backward their gradients whole too
    """
    p, kv, site = local.world_size, local.kv_items, local.site
    gather = message_seconds(profile, "all_gather", p, (p - 1) * kv * local.itemsize)
    scatter = message_seconds(profile, "reduce_scatter", p, (p - 1) * kv * ACCUMULATOR_BYTES)
    pairs = p * hop_pairs(local)
    gradients = p * kv * ACCUMULATOR_BYTES if site.trains else 0
    return _prediction(
        local,
        strategy="collective",
        kernel="flash",
        forward=Phase(
            compute_s=kernel_seconds(profile, "flash", site, pairs, "forward"),
            communication_s=gather,
            exposed_s=gather,
        ),
        backward=Phase(
            compute_s=kernel_seconds(profile, "flash", site, pairs, "backward"),
            communication_s=gather + scatter,
            exposed_s=gather + scatter,
        ),
        workspace_bytes=p * kv * local.itemsize + gradients + accumulators(local),
    )


def production(local: Local, profile: Profile) -> Prediction:
    """K/V shards travel while the kernel works on the one at hand.

    forward     (p-1) max(t, m(KV)) + t                     the last hop has nothing to wait for
    backward    (p-1) max(t, m(KV) + m(dKV)) + t + m(dKV)   the last send home is exposed
    workspace   two K/V shards and two of their gradients in flight, accumulators
    """
    p, kv = local.world_size, local.kv_items
    hop = message_seconds(profile, "send_recv", p, kv * local.itemsize)
    back = message_seconds(profile, "send_recv", p, kv * ACCUMULATOR_BYTES)
    pairs = hop_pairs(local)
    forward_s = kernel_seconds(profile, "flash", local.site, pairs, "forward")
    backward_s = kernel_seconds(profile, "flash", local.site, pairs, "backward")
    return _prediction(
        local,
        strategy="production",
        kernel="flash",
        forward=Phase(
            compute_s=p * forward_s,
            communication_s=(p - 1) * hop,
            exposed_s=(p - 1) * max(0.0, hop - forward_s),
        ),
        backward=Phase(
            compute_s=p * backward_s,
            communication_s=(p - 1) * hop + p * back,
            exposed_s=(p - 1) * max(0.0, hop + back - backward_s) + back,
        ),
        workspace_bytes=ring_buffers(local),
    )


def ulysses(local: Local, profile: Profile) -> Prediction:
    """Tokens are exchanged for heads, so that one kernel call sees whole sequences.

    forward     t(b h/p S^2) + x(q, k, v) + x(out)      x: all-to-all of (p-1)/p of the bytes
    backward    t(b h/p S^2) + x(dO) + x(dq, dk, dv)    q, k, v are kept with their heads
    workspace   a second copy of q, k, v and the output while they are exchanged
    """
    p = local.world_size
    items = local.q_items + local.kv_items + local.out_items
    exchanged = items * local.itemsize * (p - 1) // p
    latency = message_seconds(profile, "all_to_all", p, 0)
    exchange = message_seconds(profile, "all_to_all", p, exchanged) + latency
    pairs = p * hop_pairs(local)
    return _prediction(
        local,
        strategy="ulysses",
        kernel="flash",
        forward=Phase(
            compute_s=kernel_seconds(profile, "flash", local.site, pairs, "forward"),
            communication_s=exchange,
            exposed_s=exchange,
        ),
        backward=Phase(
            compute_s=kernel_seconds(profile, "flash", local.site, pairs, "backward"),
            communication_s=exchange,
            exposed_s=exchange,
        ),
        workspace_bytes=2 * items * local.itemsize,
    )


def local_kernel(local: Local, profile: Profile) -> Prediction:
    """One rank: every strategy is the local kernel, and nothing is sent."""
    pairs = hop_pairs(local)
    return _prediction(
        local,
        strategy="production",
        kernel="flash",
        forward=Phase(compute_s=kernel_seconds(profile, "flash", local.site, pairs, "forward")),
        backward=Phase(compute_s=kernel_seconds(profile, "flash", local.site, pairs, "backward")),
        workspace_bytes=accumulators(local),
    )


def accumulators(local: Local) -> int:
    """Float32 sums: the output and its logsumexp forward, dq backward; they do not coexist."""
    forward = local.out_items * ACCUMULATOR_BYTES + local.row_bytes
    backward = local.q_items * ACCUMULATOR_BYTES if local.site.trains else 0
    return max(forward, backward)


def ring_buffers(local: Local) -> int:
    """K/V shards in use and in flight, in backward also their gradients, and accumulators."""
    gradients = 2 * local.kv_items * ACCUMULATOR_BYTES if local.site.trains else 0
    return 2 * local.kv_items * local.itemsize + gradients + accumulators(local)


def _prediction(
    local: Local,
    *,
    strategy: str,
    kernel: str,
    forward: Phase,
    backward: Phase,
    workspace_bytes: int,
) -> Prediction:
    return Prediction(
        strategy=strategy,
        kernel=kernel,
        forward=forward,
        backward=backward if local.site.trains else Phase(),
        saved_bytes=local.saved_bytes,
        workspace_bytes=workspace_bytes,
    )


FORMULAS: Mapping[str, Formula] = {
    "simple": simple,
    "collective": collective,
    "production": production,
    "ulysses": ulysses,
}


def observed(local: Local, profile: Profile, strategy: str) -> Prediction:
    """A whole strategy of other code, as its records show it; one rank, forward.

    forward     F(pairs) / rate        simple computes masked pairs too
    workspace   base + tensors * bytes(q) + scores * bytes(b h n^2)
    """
    if local.world_size > 1 or local.site.trains:
        raise ProfileError(
            f"profile {profile.name!r} was observed forward on one rank: it holds no backward and"
            " no message. Do: plan with another profile, such as one from `ringfx calibrate`."
        )
    row = next((row for row in profile.memory if row.strategy == strategy), None)
    if row is None:
        raise ProfileError(f"profile {profile.name!r} has no memory row for {strategy!r}.")
    scores = dense_pairs(local) * local.itemsize
    pairs = dense_pairs(local) if strategy == "simple" else hop_pairs(local)
    needed = row.base_bytes + row.tensors * local.q_items * local.itemsize + row.scores * scores
    return _prediction(
        local,
        strategy=strategy,
        kernel=strategy,
        forward=Phase(compute_s=kernel_seconds(profile, strategy, local.site, pairs, "forward")),
        backward=Phase(),
        workspace_bytes=round(needed),
    )


def predict(site: AttentionSite, strategy: str, world_size: int, profile: Profile) -> Prediction:
    """Time and memory of one attention under one strategy over ``world_size`` ranks."""
    local = local_share(site, world_size)
    if profile.kind == "observed":
        return observed(local, profile, strategy)
    if world_size == 1:
        return replace(local_kernel(local, profile), strategy=strategy)
    return FORMULAS[strategy](local, profile)
