"""What one attention costs under each strategy, term by term as ``ringfx/ops`` runs it.

p ranks, t_h the kernel time of hop h (the slowest rank's), H hops that the mask leaves, and
m(KV), m(dKV) the messages of a rank's K and V in its dtype, of their gradients in float32.
What overlaps costs the larger of both, and what a message takes from compute while it travels:
moving a byte takes some of a core's time, whatever the link.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from math import lcm
from typing import TypeAlias

from ringfx.cost_model.prediction import footprint
from ringfx.cost_model.prediction.kernel_choice import REFERENCE, picks
from ringfx.cost_model.prediction.profile import Direction, Profile
from ringfx.cost_model.prediction.rank_share import Local, local_share
from ringfx.cost_model.prediction.terms import (
    handling_seconds,
    kernel_seconds,
    message_seconds,
    stored_tile,
)
from ringfx.cost_model.prediction.work import (
    MASKED_TILE,
    Work,
    gathered_work,
    ring_work,
    whole_work,
)
from ringfx.errors import ProfileError
from ringfx.ir.kernel_table import KernelChoice, Pick
from ringfx.ir.values import AttentionSite

__all__ = ["FORMULAS", "Phase", "Prediction", "predict"]


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Seconds of one direction on one rank; ``exposed_s`` is communication nothing hides."""

    compute_s: float = 0.0
    communication_s: float = 0.0
    exposed_s: float = 0.0

    @property
    def total_s(self) -> float:
        return self.compute_s + self.exposed_s

    def __add__(self, other: Phase) -> Phase:
        return Phase(
            compute_s=self.compute_s + other.compute_s,
            communication_s=self.communication_s + other.communication_s,
            exposed_s=self.exposed_s + other.exposed_s,
        )


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Time and memory of one attention under one strategy, on the slowest rank."""

    strategy: str
    kernel: str
    """``KernelChoice.text``: the fastest that admit it."""
    forward: Phase
    backward: Phase
    """All zero where nothing trains."""
    saved_bytes: int
    workspace_bytes: int
    result_bytes: int = 0
    """Of the saved bytes those of the output and its logsumexp."""

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


Formula: TypeAlias = Callable[[Local, Profile, Direction, Pick], Phase]
"""(one rank's share, constants, direction, its kernels) -> seconds."""


def simple(local: Local, profile: Profile, direction: Direction, pick: Pick) -> Phase:
    """A ring that waits: every message is exposed.

    forward     sum t_h + (p-1) m(KV)
    backward    sum t_h + (p-1) m(KV) + p m(dKV)     gradients go all the way round, home
    """
    p = local.world_size
    hops = _hop_seconds(local, profile, pick, direction)
    messages_s = (p - 1) * _kv(local, profile)
    if direction == "backward":
        messages_s += p * _kv_gradients(local, profile)
    return Phase(compute_s=_sum(hops), communication_s=messages_s, exposed_s=messages_s)


def production(local: Local, profile: Profile, direction: Direction, pick: Pick) -> Phase:
    """A ring whose next block travels while the kernel works; it ends with the last hop needed.

    With the heads in N groups, each hop is N calls and N messages of 1/N of the bytes:

    forward     sum over h < H-1 of max(t_h, m(KV)), + t_(H-1)
    backward    the same, with m(dKV) beside each t_h from the second hop on: the gradients of the
                hop before travel then; the last group's go home exposed, m(dKV) / N
    """
    groups = local.ring_groups
    hops = _last_alone(_hop_seconds(local, profile, pick, direction, groups=groups))
    num = len(hops)
    starts = accumulate((times for _, times in hops), initial=0)
    kv_bytes, gradient_bytes = _kv_bytes(local), _gradient_bytes(local)
    sent = [kv_bytes] * (num - 1) + [0]
    beside = [_kv(local, profile, groups)] * (num - 1) + [0.0]
    home_s = 0.0
    if direction == "backward" and num > 1:
        gradients_s = _kv_gradients(local, profile, groups)
        has_gradients = [start >= 2 for start, _ in zip(starts, hops, strict=False)]
        beside = [m + gradients_s * more for m, more in zip(beside, has_gradients, strict=True)]
        sent = [x + gradient_bytes * more for x, more in zip(sent, has_gradients, strict=True)]
        beside[-1] += gradients_s * (groups - 1) / groups
        sent[-1] += gradient_bytes * (groups - 1) // groups
        home_s = gradients_s / groups
    each = [times for _, times in hops]
    exposed = map(partial(_exposed, profile), (hop_s for hop_s, _ in hops), beside, sent)
    return Phase(
        compute_s=_sum(hops),
        communication_s=_sum(zip(beside, each, strict=True)) + home_s,
        exposed_s=_sum(zip(exposed, each, strict=True)) + home_s,
    )


Hops: TypeAlias = list[tuple[float, int]]
"""Seconds of a hop, and how many hops, one after the other, take so long."""


def _sum(hops: Iterable[tuple[float, int]]) -> float:
    return sum(hop_s * times for hop_s, times in hops)


def _last_alone(hops: Hops) -> Hops:
    """The last hop is sent nothing: it is told from those that take as long."""
    last_s, times = hops[-1]
    return [*hops[:-1], *([(last_s, times - 1)] if times > 1 else []), (last_s, 1)]


def collective(local: Local, profile: Profile, direction: Direction, pick: Pick) -> Phase:
    """K and V are gathered whole, then attended at once; their gradients are reduce-scattered.

    Where all of K and V is much, in N groups of heads, one after the other:

    forward     t + gather(KV)
    backward    t + gather(KV) + scatter(dKV)
    """
    p, groups = local.world_size, local.gathered_groups
    work = gathered_work(local.site.spec, local.layout, p)
    compute_s = max(_seconds(profile, pick, local.site, w, direction, groups) for w in work)
    others = (p - 1) * local.kv_items / groups
    messages_s = groups * message_seconds(profile, "all_gather", p, others * local.itemsize)
    if direction == "backward":
        gradient_bytes = others * local.accumulator_bytes
        messages_s += groups * message_seconds(profile, "reduce_scatter", p, gradient_bytes)
    return Phase(compute_s=compute_s, communication_s=messages_s, exposed_s=messages_s)


def ulysses(local: Local, profile: Profile, direction: Direction, pick: Pick) -> Phase:
    """Tokens for heads, whole sequences at once, and back; K/V heads repeated until p divides them.

    forward     t + x(q) + x(k) + x(v) + x(out, lse)
    backward    t + x(q, out, dout, lse) + x(k) + x(v) + x(dq) + x(dk) + x(dv)
    """
    site, p = local.site, local.world_size
    compute_s = kernel_seconds(profile, pick, site, whole_work(site.spec), direction, 1 / p)
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
    copies = kv_copies(local.site, local.world_size)
    return copies * local.k_items * size, copies * local.v_items * size


def kv_copies(site: AttentionSite, world_size: int) -> int:
    """How often ulysses repeats each K/V head."""
    return lcm(site.kv_heads, world_size) // site.kv_heads


FORMULAS: Mapping[str, Formula] = {
    "simple": simple,
    "collective": collective,
    "production": production,
    "ulysses": ulysses,
}


# --- parts ------------------------------------------------------------------------------------


def _hop_seconds(
    local: Local,
    profile: Profile,
    pick: Pick,
    direction: Direction,
    *,
    groups: int = 1,
) -> Hops:
    """The slowest rank's kernel time of each hop that the mask leaves."""
    tile = stored_tile(local.site) if pick.plain == REFERENCE else MASKED_TILE
    table = ring_work(local.site.spec, local.layout, local.world_size, tile)
    slowest = (
        max(_seconds(profile, pick, local.site, work, direction, groups) for work in column)
        for column in zip(*table.rows, strict=True)
    )
    return list(zip(slowest, table.times, strict=True))


def _seconds(
    profile: Profile,
    pick: Pick,
    site: AttentionSite,
    work: Work,
    direction: Direction,
    groups: int,
) -> float:
    """Kernel time with the heads in groups: as many calls as groups, each on its share."""
    if not work.calls:
        return 0.0
    return groups * kernel_seconds(profile, pick, site, work, direction, 1 / groups)


def _kv_bytes(local: Local) -> int:
    return local.kv_items * local.itemsize


def _gradient_bytes(local: Local) -> int:
    return local.kv_items * local.accumulator_bytes


def _kv(local: Local, profile: Profile, groups: int = 1) -> float:
    """All groups' K and V to the next rank."""
    size = _kv_bytes(local) / groups
    return groups * message_seconds(profile, "send_recv", local.world_size, size)


def _kv_gradients(local: Local, profile: Profile, groups: int = 1) -> float:
    size = _gradient_bytes(local) / groups
    return groups * message_seconds(profile, "send_recv", local.world_size, size)


def _exposed(profile: Profile, compute_s: float, message_s: float, sent_bytes: int) -> float:
    """What of a message does not hide: the excess over compute, and what it takes from compute."""
    lost_s = sent_bytes * profile.contention_ns_per_byte / 1e9
    return max(0.0, message_s - compute_s) + min(lost_s, message_s, compute_s)


# --- the whole --------------------------------------------------------------------------------


def predict(site: AttentionSite, strategy: str, world_size: int, profile: Profile) -> Prediction:
    """Time and memory of one attention under one strategy over ``world_size`` ranks."""
    local = local_share(site, world_size)
    if profile.kind == "observed":
        return _observed(local, profile, strategy)
    kernels, forward, backward = _fastest(local, profile, strategy)
    return Prediction(
        strategy=strategy,
        kernel=kernels.text,
        forward=forward,
        backward=backward,
        saved_bytes=local.saved_bytes,
        result_bytes=local.result_bytes,
        workspace_bytes=footprint.workspace_bytes(local, strategy),
    )


def _fastest(local: Local, profile: Profile, strategy: str) -> tuple[KernelChoice, Phase, Phase]:
    """The kernels that take least time, forward and backward, and how long."""
    forwards = _phases(local, profile, strategy, "forward")
    if not local.site.trains:
        phase, pick = min(forwards, key=_order)
        return KernelChoice(forward=pick, backward=pick), phase, Phase()
    backwards = _phases(local, profile, strategy, "backward")
    able = [
        (there, back, choice)
        for there, forward in forwards
        for back, backward in backwards
        if (choice := KernelChoice(forward=forward, backward=backward)).can_run_together
    ]
    there, back, choice = min(able, key=lambda row: _order((row[0] + row[1], None)))
    return choice, there, back


def _order(row: tuple[Phase, object]) -> tuple[float, float]:
    """What hides behind messages is less all the same."""
    return row[0].total_s, row[0].compute_s


def _phases(
    local: Local, profile: Profile, strategy: str, direction: Direction
) -> list[tuple[Phase, Pick]]:
    """For each kernel: the strategy's formula, or the local kernel's, and what any layer costs."""
    is_split = local.world_size > 1
    formula = FORMULAS[strategy] if is_split else _local_kernel
    layer_us = profile.overhead_us(strategy if is_split else "local", direction)
    handling_s = handling_seconds(profile, footprint.held_bytes(local, strategy, direction))
    any_layer = Phase(compute_s=layer_us / 1e6 + handling_s)
    return [
        (formula(local, profile, direction, pick) + any_layer, pick)
        for pick in picks(local.site, strategy, profile, direction)
    ]


def _local_kernel(local: Local, profile: Profile, direction: Direction, pick: Pick) -> Phase:
    """One rank: the strategy's kernel over the whole sequence, and nothing is sent."""
    work = whole_work(local.site.spec)
    return Phase(compute_s=kernel_seconds(profile, pick, local.site, work, direction))


def _observed(local: Local, profile: Profile, strategy: str) -> Prediction:
    """A whole strategy of other code, as its records show it; one rank, forward.

    forward     F w / rate             simple computes masked pairs too
    workspace   base + tensors * bytes(q) + scores * bytes(b h n^2)
    """
    if local.world_size > 1 or local.site.trains:
        raise ProfileError(
            f"profile {profile.name!r} was observed forward on one rank: it has no figures for "
            "backward or communication. Do: plan with another profile, such as one from `ringfx "
            "calibrate`."
        )
    row = next((row for row in profile.memory if row.strategy == strategy), None)
    if row is None:
        raise ProfileError(f"profile {profile.name!r} has no memory row for {strategy!r}.")
    rows = local.site.q_len * local.site.kv_len
    work = Work(calls=1, pairs=rows * (1.0 if strategy == "simple" else local.site.density))
    scores = local.site.batch * local.site.heads * rows * local.itemsize
    needed = row.base_bytes + row.tensors * local.q_items * local.itemsize + row.scores * scores
    seconds = kernel_seconds(profile, Pick(strategy), local.site, work, "forward")
    return Prediction(
        strategy=strategy,
        kernel=strategy,
        forward=Phase(compute_s=seconds),
        backward=Phase(),
        saved_bytes=0,
        workspace_bytes=round(needed),
    )
