"""The ring with its messages hidden behind the tiles.

The heads are taken in groups, each a ring of its own; one step is one group at one hop. Two groups
take turns until their rings are done, then the next two. When a step starts, the group's block
leaves for the next rank and the next block is asked of the previous one; both are given until the
step after this one. So a block travels while others are worked on, and only two groups' blocks are
ever away from home: beside the results, memory holds a fraction of a rank's K/V, whatever p is.

    for two groups of the heads:
        for hop in 0 .. hops-1:
            for group in the two:
                wait    for the messages of the step before the last
                start   my group's K/V -> next rank,  previous rank's -> spare buffer
                merge   attention(queries of the group, K/V of the group)

In the backward, what earlier ranks have added to a block's dK and dV travels beside the block, one
hop behind, and is needed only when this rank has computed its own share. The owner's share stays at
home; the others' comes back to it after the last hop.

Blocks that the mask empties for everyone are not sent: the ring ends at the last hop that any rank
needs, which all ranks derive from the positions alone and so agree on.

Shapes: B batch, H query heads, G key/value heads, D and E the head dims of q, k and of v, N all
elements of a group's block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import accumulate

import torch

from ringfx.comm.process_group import Exchange
from ringfx.cost_model.prediction.footprint import (
    Calls,
    gradient_moments,
    output_moments,
    sums_backward,
    sums_forward,
)
from ringfx.cost_model.prediction.formulas import (
    Hops,
    Phase,
    exposed_seconds,
    gradient_seconds,
    hop_seconds,
    hop_sum,
    kv_seconds,
)
from ringfx.cost_model.prediction.profile import Profile
from ringfx.cost_model.prediction.profile_rows import Direction
from ringfx.cost_model.prediction.rank_share import Local
from ringfx.cost_model.prediction.strategy import Strategy
from ringfx.cost_model.prediction.work import Work, ring_work
from ringfx.ir.attention_spec import AttentionSpec
from ringfx.ir.dilation import AnyLayout
from ringfx.ir.kernel_table import Pick
from ringfx.ops.kernels.kernel import accumulation_dtype
from ringfx.ops.tiling.attention_call import Problem
from ringfx.ops.tiling.head_groups import (
    MOST_GROUPS,
    RING_GROUPS,
    HeadGroup,
    head_groups,
    ring_bytes,
)
from ringfx.ops.tiling.merge import Gradients, Output, Sums, attend, attend_backward
from ringfx.ops.tiling.pieces import Tiling, pieces, runs_of
from ringfx.strategies import needed
from ringfx.strategies.buffer_pool import POOL
from ringfx.strategies.packing import pack_into, unpack

__all__ = ["PRODUCTION", "hops_needed"]

Tensor = torch.Tensor

BLOCK_TAG, SHARE_TAG, HOME_TAG = 0, MOST_GROUPS, 2 * MOST_GROUPS
"""Messages of different kinds and groups are told apart where they are under way together."""
TAKING_TURNS = 2
"""Groups whose rings run at the same time: while one is worked on, the other's blocks travel."""


@lru_cache(maxsize=256)
def hops_needed(spec: AttentionSpec, q: AnyLayout, k: AnyLayout) -> int:
    """How many blocks each rank must see, its own included: the same number on all ranks.

    Only positions count, never the captured tensors, which could differ between ranks.
    """
    size = q.world_size
    coarse = Tiling(masked=1 << 62)
    anywhere = (0, 1 << 62)
    for hop in reversed(range(1, size)):
        for rank in range(size):
            runs = runs_of(q, rank), runs_of(k, (rank - hop) % size)
            if any(pieces(spec, *runs, coarse, b=anywhere, h=anywhere, inputs=None)):
                return hop + 1
    return 1


def _backward_hops(problem: Problem) -> int:
    """Rows whose mask was added and absorbed their scores send gradients to all keys."""
    may_lose_rows = problem.spec.keep is not None and not problem.spec.is_causal
    if problem.spec.fully_masked == "absorbed" and may_lose_rows:
        return problem.ranks.size
    return hops_needed(problem.spec, problem.q_layout, problem.kv_layout)


def _groups(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[HeadGroup, ...]:
    threads = problem.ranks.fewest_threads() if q.device.type == "cpu" else 1
    least, most = ring_bytes(q.device, problem.ranks.size), RING_GROUPS
    asked = problem.head_groups
    return head_groups(q, k, v, least_bytes=least, most=most, threads=threads, asked=asked)


def _steps(num_groups: int, hops: int) -> Iterator[tuple[int, int, int]]:
    """Group and hop of each step, and how many steps later the group's next one is."""
    for first in range(0, num_groups, TAKING_TURNS):
        turn = range(first, min(first + TAKING_TURNS, num_groups))
        for hop in range(hops):
            for g in turn:
                yield g, hop, len(turn)


class _InFlight:
    """Messages under way, by the step that started them, and what to do when they have arrived."""

    def __init__(self) -> None:
        self._step = -1
        self._messages: list[tuple[int, Exchange, Callable[[], None]]] = []

    def next_step(self, given: int) -> None:
        """Waits for what started so many steps ago."""
        self._step += 1
        self._settle(self._step - given)

    def add(self, exchange: Exchange, arrived: Callable[[], None]) -> None:
        self._messages.append((self._step, exchange, arrived))

    def settle(self) -> None:
        """Waits for all."""
        self._settle(self._step)

    def _settle(self, up_to: int) -> None:
        while self._messages and self._messages[0][0] <= up_to:
            _, exchange, arrived = self._messages.pop(0)
            exchange.wait()
            arrived()


class _Blocks:
    """The K/V of each head group as they pass by, of the own rank first."""

    def __init__(self, groups: Sequence[HeadGroup], k: Tensor, v: Tensor) -> None:
        self.own = [(k[:, group.kv], v[:, group.kv]) for group in groups]
        self.passing: list[Tensor | None] = [None] * len(groups)

    def at(self, g: int) -> tuple[Tensor, Tensor]:
        buffer_N = self.passing[g]
        return self.own[g] if buffer_N is None else unpack(buffer_N, *self.own[g])

    def leaving(self, g: int) -> tuple[Tensor, Tensor]:
        """What is sent on and what is received into."""
        k, v = self.own[g]
        sent_N = self.passing[g]
        if sent_N is None:
            sent_N = pack_into(POOL.take(k.numel() + v.numel(), k.dtype, k.device), k, v)
        received_N = POOL.take(sent_N.numel(), k.dtype, k.device)
        return sent_N, received_N

    def done(self, g: int, received_N: Tensor | None) -> None:
        """The group's step at this hop is over, and the next block is here if there is one."""
        old = self.passing[g]
        if old is not None:
            POOL.give(old)
        self.passing[g] = received_N


def forward(
    problem: Problem, q_BHQD: Tensor, k_BGKD: Tensor, v_BGKE: Tensor
) -> tuple[Tensor, Tensor]:
    """The output of the local queries over all keys and its logsumexp."""
    if needed.in_blocks(problem.spec):
        return needed.forward(problem, q_BHQD, k_BGKD, v_BGKE, ahead=1)
    ranks = problem.ranks
    groups = _groups(problem, q_BHQD, k_BGKD, v_BGKE)
    hops = hops_needed(problem.spec, problem.q_layout, problem.kv_layout)
    output = Output.empty(problem, q_BHQD, v_BGKE.shape[-1])
    outputs = [output.of_heads(group.q) for group in groups]
    blocks = _Blocks(groups, k_BGKD, v_BGKE)
    in_flight = _InFlight()
    q_runs = problem.q_runs(ranks.rank)
    for g, hop, given in _steps(len(groups), hops):
        group, k_runs = groups[g], problem.k_runs(ranks.neighbour(-hop))
        in_flight.next_step(given)
        k, v = blocks.at(g)
        if hop < hops - 1:
            _start_blocks(problem, blocks, g, in_flight, f"forward: K/V, hop {hop + 1}")
        attend(problem.heads(group), outputs[g], q_BHQD[:, group.q], k, v, q_runs, k_runs)
        if hop == hops - 1:
            blocks.done(g, None)
    in_flight.settle()
    for part in outputs:
        part.finish()
    return output.out_BHQE, output.lse_BHQ


def _start_blocks(
    problem: Problem, blocks: _Blocks, g: int, in_flight: _InFlight, operation: str
) -> None:
    ranks = problem.ranks
    sent_N, received_N = blocks.leaving(g)
    fresh = blocks.passing[g] is None

    def arrived() -> None:
        if fresh:
            POOL.give(sent_N)
        blocks.done(g, received_N)

    exchange = ranks.exchange(
        operation,
        send=sent_N,
        to=ranks.neighbour(1),
        receive=received_N,
        source=ranks.neighbour(-1),
        tag=BLOCK_TAG + g,
    )
    in_flight.add(exchange, arrived)


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
    if needed.in_blocks(problem.spec):
        rows = (dout_BHQE, q_BHQD, k_BGKD, v_BGKE, out_BHQE, lse_BHQ)
        return needed.backward(problem, *rows, ahead=1)
    ranks = problem.ranks
    groups = _groups(problem, q_BHQD, k_BGKD, v_BGKE)
    hops = _backward_hops(problem)
    mine = Sums.empty(problem, q_BHQD, k_BGKD, v_BGKE)
    parts = [mine.of_heads(group) for group in groups]
    blocks = _Blocks(groups, k_BGKD, v_BGKE)
    shares: list[Tensor | None] = [None] * len(groups)
    in_flight = _InFlight()
    q_runs = problem.q_runs(ranks.rank)
    for g, hop, given in _steps(len(groups), hops):
        group, k_runs = groups[g], problem.k_runs(ranks.neighbour(-hop))
        in_flight.next_step(given)
        k, v = blocks.at(g)
        if hop < hops - 1:
            _start_blocks(problem, blocks, g, in_flight, f"backward: K/V, hop {hop + 1}")
        incoming = _start_share(problem, shares, g, f"backward: dK/dV, hop {hop}")
        local = parts[g]
        if hop > 0:
            kept_in = accumulation_dtype(k.dtype)
            share_N = POOL.take(k.numel() + v.numel(), kept_in, k.device)
            local = local.with_keys(*unpack(share_N, k, v))
            shares[g] = share_N
        attend_backward(
            problem.heads(group),
            local,
            dout_BHQE[:, group.q],
            q_BHQD[:, group.q],
            k,
            v,
            out_BHQE[:, group.q],
            lse_BHQ[:, group.q],
            q_runs,
            k_runs,
        )
        local.dk.finish()
        local.dv.finish()
        if incoming is not None:
            _add_incoming(incoming, share_N)
        if hop == hops - 1:
            blocks.done(g, None)
        if 0 < hop == hops - 1:
            _start_home(
                problem, local=parts[g], share_N=share_N, g=g, hops=hops, in_flight=in_flight
            )
    in_flight.settle()
    for part in parts:
        part.dq.finish()
    return Gradients(mine.dq.total_BHND, mine.dk.total_BHND, mine.dv.total_BHND, mine.inputs)


def _start_share(
    problem: Problem, shares: list[Tensor | None], g: int, operation: str
) -> Exchange | None:
    """Sends on what this rank made of the group's dK/dV one hop ago, and receives the previous'."""
    share_N, ranks = shares[g], problem.ranks
    if share_N is None:
        return None
    incoming_N = POOL.take(share_N.numel(), share_N.dtype, share_N.device)
    return ranks.exchange(
        operation,
        send=share_N,
        to=ranks.neighbour(1),
        receive=incoming_N,
        source=ranks.neighbour(-1),
        tag=SHARE_TAG + g,
    )


def _add_incoming(incoming: Exchange, share_N: Tensor) -> None:
    incoming.wait()
    sent_N, received_N = incoming.buffers
    share_N.add_(received_N)
    POOL.give(sent_N)
    POOL.give(received_N)


def _start_home(
    problem: Problem, *, local: Sums, share_N: Tensor, g: int, hops: int, in_flight: _InFlight
) -> None:
    """The last hop's sum goes to the owner of the block, and that of the own block comes in."""
    ranks = problem.ranks
    home_N = POOL.take(share_N.numel(), share_N.dtype, share_N.device)

    def arrived() -> None:
        dk, dv = unpack(home_N, local.dk.total_BHND, local.dv.total_BHND)
        local.dk.total_BHND.add_(dk)
        local.dv.total_BHND.add_(dv)
        POOL.give(home_N)
        POOL.give(share_N)

    exchange = ranks.exchange(
        "backward: dK/dV, home",
        send=share_N,
        to=ranks.neighbour(1 - hops),
        receive=home_N,
        source=ranks.neighbour(hops - 1),
        tag=HOME_TAG + g,
    )
    in_flight.add(exchange, arrived)


# --- what it costs -------------------------------------------------------------------------------


def time(local: Local, profile: Profile, direction: Direction, pick: Pick) -> Phase:
    """A ring whose next block travels while the kernel works; it ends with the last hop needed.

    With the heads in N groups, each hop is N calls and N messages of 1/N of the bytes:

    forward     sum over h < H-1 of max(t_h, m(KV)), + t_(H-1)
    backward    the same, with m(dKV) beside each t_h from the second hop on: the gradients of the
                hop before travel then; the last group's go home exposed, m(dKV) / N
    """
    if needed.in_blocks(local.site.spec):
        return needed.time(local, profile, direction, pick, ahead=1)
    groups = num_groups(local)
    hops = _last_alone(hop_seconds(local, profile, pick, direction, groups=groups))
    num = len(hops)
    starts = accumulate((times for _, times in hops), initial=0)
    kv_bytes, gradient_bytes = local.kv_bytes, local.gradient_bytes
    sent = [kv_bytes] * (num - 1) + [0]
    beside = [kv_seconds(local, profile, groups)] * (num - 1) + [0.0]
    home_s = 0.0
    if direction == "backward" and num > 1:
        gradients_s = gradient_seconds(local, profile, groups)
        has_gradients = [start >= 2 for start, _ in zip(starts, hops, strict=False)]
        beside = [m + gradients_s * more for m, more in zip(beside, has_gradients, strict=True)]
        sent = [x + gradient_bytes * more for x, more in zip(sent, has_gradients, strict=True)]
        beside[-1] += gradients_s * (groups - 1) / groups
        sent[-1] += gradient_bytes * (groups - 1) // groups
        home_s = gradients_s / groups
    each = [times for _, times in hops]
    exposed = map(partial(exposed_seconds, profile), (hop_s for hop_s, _ in hops), beside, sent)
    return Phase(
        compute_s=hop_sum(hops),
        communication_s=hop_sum(zip(beside, each, strict=True)) + home_s,
        exposed_s=hop_sum(zip(exposed, each, strict=True)) + home_s,
    )


def _last_alone(hops: Hops) -> Hops:
    """The last hop is sent nothing: it is told from those that take as long."""
    last_s, times = hops[-1]
    return [*hops[:-1], *([(last_s, times - 1)] if times > 1 else []), (last_s, 1)]


def num_groups(local: Local) -> int:
    """Groups of heads, as ``_groups`` makes them on threads enough."""
    least = ring_bytes(torch.device(local.site.device), local.world_size)
    return local.groups(least, RING_GROUPS)


def memory(local: Local, calls: Calls) -> Iterator[int]:
    """Bytes held, moment by moment."""
    if needed.in_blocks(local.site.spec):
        return needed.memory(local, calls, ahead=1)
    return (_forward_moments if calls.direction == "forward" else _backward_moments)(local, calls)


def _forward_moments(local: Local, calls: Calls) -> Iterator[int]:
    """(o + r) a + the ring's buffers, and a call on 1/N of the heads."""
    yield from output_moments(local, _ring_buffers(local, calls.direction))
    buffers = _ring_buffers(local, calls.direction)
    yield sums_forward(local) + buffers + calls.of(_ring(local), 1 / num_groups(local))


def _backward_moments(local: Local, calls: Calls) -> Iterator[int]:
    """(q + kv) a + the ring's buffers, and a call on 1/N of the heads."""
    buffers = _ring_buffers(local, calls.direction)
    yield sums_backward(local) + buffers + calls.of(_ring(local), 1 / num_groups(local))
    yield from gradient_moments(local, kept=buffers)


def _ring_buffers(local: Local, direction: Direction) -> int:
    """Buffers that the ring's pool makes, of kv/N elements: tests/ops holds them to the schedule.

    Each of the T groups that take turns sends one block and receives one, 2 T. Backward, shares of
    dK and dV travel a hop behind, T + 1 of them, and home; where they are as large as blocks they
    take those that are free.
    """
    groups = num_groups(local)
    turns, hops = min(TAKING_TURNS, groups), _hops(local, direction)
    blocks, shares = (2 * turns if hops > 1 else 0), 0
    if direction == "backward" and hops > 1:
        if local.itemsize == local.accumulator_bytes:
            shares = 0 if hops == 2 else turns + min(hops, 4) - 2
        else:
            shares = 2 * turns + (hops > 2)
    group = local.kv_items // groups
    return group * (blocks * local.itemsize + shares * local.accumulator_bytes)


def _hops(local: Local, direction: Direction) -> int:
    """Blocks that each rank sees; all of them where rows without a key have gradients."""
    spec = local.site.spec
    may_lose_rows = spec.keep is not None and not spec.is_causal
    if direction == "backward" and spec.fully_masked == "absorbed" and may_lose_rows:
        return local.world_size
    return ring_work(spec, local.layout, local.world_size).hops


def _ring(local: Local) -> Iterator[Work]:
    table = ring_work(local.site.spec, local.layout, local.world_size)
    return (work for row in table.rows for work in row)


PRODUCTION = Strategy(
    name="production",
    gloss="overlapped ring",
    summary="ring of K/V with the next block in flight, fused kernels, empty tiles skipped",
    forward=forward,
    backward=backward,
    time=time,
    memory=memory,
    num_groups=num_groups,
)
