"""Attention in blocks of positions: each rank sends each other the rows that it needs, no others.

Where a mask keeps a query's keys within a block of positions (dilated segments, chunked attention),
most ranks need nothing of most others, and of a neighbour only the rows of the block that lies on
both. All ranks derive from positions alone who needs what. Rows go straight from their owner to
who needs them, and their gradients straight back:

    for each distance d at which any rank needs another's rows:
        send  the rows that rank r + d needs,  receive those that I need of rank r - d
        merge attention(my queries, received rows)

``ahead`` says how many distances are under way while one is computed: 0 waits for each, 1 hides
each behind the one before, ``ALL_AT_ONCE`` starts all of them before the first is computed.

Shapes: B batch, H query heads, G key/value heads, N rows, D and E the head dims of q, k and of v.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from ringfx.comm.process_group import Exchange
from ringfx.cost_model.prediction.footprint import (
    Calls,
    gradient_moments,
    output_moments,
    sums_backward,
    sums_forward,
)
from ringfx.cost_model.prediction.formulas import Phase, exposed_seconds, hop_seconds
from ringfx.cost_model.prediction.profile import Profile
from ringfx.cost_model.prediction.profile_rows import Direction
from ringfx.cost_model.prediction.rank_share import Local
from ringfx.cost_model.prediction.terms import message_seconds
from ringfx.cost_model.prediction.work import ring_work, some_ranks
from ringfx.ir.attention_spec import AttentionSpec
from ringfx.ir.dilation import AnyLayout
from ringfx.ir.kernel_table import Pick
from ringfx.ops.kernels.kernel import accumulation_dtype
from ringfx.ops.tiling.attention_call import Problem
from ringfx.ops.tiling.merge import Gradients, Output, Sums, attend, attend_backward
from ringfx.ops.tiling.pieces import Run, Tiling, block_size, pieces, runs_of
from ringfx.ops.tiling.tile_sizes import MASKED_TILE
from ringfx.strategies.packing import pack

__all__ = [
    "ALL_AT_ONCE", "backward", "distances", "forward", "in_blocks", "memory", "needed_rows", "time",
]  # fmt: skip

Tensor = torch.Tensor

ALL_AT_ONCE = 1 << 16
SHARE_TAG = 1 << 16
"""Gradients on their way home are told apart from rows by their tag."""


def in_blocks(spec: AttentionSpec) -> bool:
    """Whether ranks need so little of each other that rows are sent by need.

    Rows whose mask was added and absorbed their scores send gradients to all keys.
    """
    return block_size(spec.keep) > 0 and spec.fully_masked != "absorbed"


@lru_cache(maxsize=65_536)
def needed_rows(
    spec: AttentionSpec, q: AnyLayout, k: AnyLayout, owner: int, receiver: int
) -> tuple[Run, ...]:
    """The rows of one rank's keys that another's queries attend, by positions alone."""
    runs, anywhere = (runs_of(q, receiver), runs_of(k, owner)), (0, 1 << 62)
    coarse = Tiling(masked=1 << 62)
    found = pieces(spec, *runs, coarse, b=anywhere, h=anywhere, inputs=None)
    return _united(piece.k for piece in found)


def _united(runs: Iterator[Run]) -> tuple[Run, ...]:
    """Disjoint, in order of offset."""
    found: list[Run] = []
    for run in sorted(set(runs), key=lambda run: (run.offset, -run.length)):
        last = found[-1] if found else None
        if last is None or run.offset >= last.offset + last.length or run.position > last.stop:
            found.append(run)
        elif run.stop > last.stop:
            found[-1] = replace(last, length=run.stop - last.position)
    return tuple(found)


@lru_cache(maxsize=1024)
def distances(spec: AttentionSpec, q: AnyLayout, k: AnyLayout) -> tuple[int, ...]:
    """How far apart ranks are of which one needs rows of the other; the same on all ranks."""
    size = q.world_size
    near = {
        (receiver - owner) % size
        for receiver in range(size)
        for owner in _in_same_blocks(q, k, block_size(spec.keep), receiver)
    }
    return tuple(
        distance
        for distance in sorted(near - {0})
        if any(needed_rows(spec, q, k, r, (r + distance) % size) for r in range(size))
    )


def _in_same_blocks(q: AnyLayout, k: AnyLayout, block: int, receiver: int) -> set[int]:
    """The ranks with keys in the blocks of a rank's queries."""
    runs = _runs_in_order(k)
    found = set()
    for run in runs_of(q, receiver):
        start, stop = run.position // block * block, -(-run.stop // block) * block
        first = bisect.bisect_right(runs, start, key=lambda found: found[0].stop)
        for other, rank in itertools.islice(runs, first, None):
            if other.position >= stop:
                break
            found.add(rank)
    return found


@lru_cache(maxsize=64)
def _runs_in_order(layout: AnyLayout) -> list[tuple[Run, int]]:
    """All ranks' runs by position, with their rank."""
    found = [(run, rank) for rank in range(layout.world_size) for run in runs_of(layout, rank)]
    return sorted(found, key=lambda row: row[0].position)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Parcel:
    """Rows of another rank's keys, packed one run after the other."""

    runs: tuple[Run, ...]
    """Their positions, and where they are in the parcel."""
    k_BGND: Tensor
    v_BGNE: Tensor


def _packed(runs: Sequence[Run]) -> tuple[Run, ...]:
    starts = itertools.accumulate((run.length for run in runs), initial=0)
    return tuple(replace(run, offset=start) for run, start in zip(runs, starts, strict=False))


def _count(runs: Sequence[Run]) -> int:
    return sum(run.length for run in runs)


def _taken(x_BGKD: Tensor, runs: Sequence[Run]) -> Tensor:
    parts = [x_BGKD[:, :, run.offset : run.offset + run.length] for run in runs]
    return torch.cat(parts, 2) if parts else x_BGKD[:, :, :0]


@dataclass(frozen=True, eq=False, kw_only=True)
class _Rows:
    """Who needs what of this rank, and what this rank needs."""

    problem: Problem
    k_BGKD: Tensor
    v_BGKE: Tensor

    @property
    def distances(self) -> tuple[int, ...]:
        problem = self.problem
        return distances(problem.spec, problem.q_layout, problem.kv_layout)

    def sent(self, distance: int) -> tuple[Run, ...]:
        ranks = self.problem.ranks
        return self._needed(ranks.rank, ranks.neighbour(distance))

    def received(self, distance: int) -> tuple[Run, ...]:
        ranks = self.problem.ranks
        return self._needed(ranks.neighbour(-distance), ranks.rank)

    def _needed(self, owner: int, receiver: int) -> tuple[Run, ...]:
        problem = self.problem
        return needed_rows(problem.spec, problem.q_layout, problem.kv_layout, owner, receiver)

    def like(self, runs: Sequence[Run], dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Views of one new buffer with room for these rows of K and V."""
        shapes = [(*x.shape[:2], _count(runs), x.shape[3]) for x in (self.k_BGKD, self.v_BGKE)]
        buffer_N = self.k_BGKD.new_empty(sum(map(math.prod, shapes)), dtype=dtype)
        k, v = buffer_N.split([math.prod(shape) for shape in shapes])
        return k.view(shapes[0]), v.view(shapes[1])

    def arriving(self, operation: str, *, ahead: int) -> Iterator[tuple[int, _Parcel]]:
        """Distances and parcels in order; ``ahead`` of them leave at once, the others in turn."""
        todo = [*self.distances]
        started = deque(self._start(distance, operation) for distance in todo[:ahead])

        def arrive() -> Iterator[tuple[int, _Parcel]]:
            for i, distance in enumerate(todo):
                started.extend(self._start(d, operation) for d in todo[i + ahead : i + ahead + 1])
                exchange, parcel = started.popleft()
                exchange.wait()
                yield distance, parcel

        return arrive()

    def _start(self, distance: int, operation: str) -> tuple[Exchange, _Parcel]:
        ranks, runs = self.problem.ranks, self.received(distance)
        k, v = self.like(runs)
        sent = (_taken(x, self.sent(distance)) for x in (self.k_BGKD, self.v_BGKE))
        exchange = ranks.exchange(
            f"{operation}, distance {distance}",
            send=pack(*sent), to=ranks.neighbour(distance),
            receive=_buffer(k, v), source=ranks.neighbour(-distance), tag=distance,
        )  # fmt: skip
        return exchange, _Parcel(runs=_packed(runs), k_BGND=k, v_BGNE=v)

    def send_home(self, distance: int, dk_BGND: Tensor, dv_BGNE: Tensor) -> _Home:
        """Starts the gradients of received rows on their way, and those of own rows here."""
        ranks, runs = self.problem.ranks, self.sent(distance)
        dk, dv = self.like(runs, dk_BGND.dtype)
        exchange = ranks.exchange(
            f"backward: dK/dV, distance {distance}",
            send=pack(dk_BGND, dv_BGNE), to=ranks.neighbour(-distance),
            receive=_buffer(dk, dv), source=ranks.neighbour(distance), tag=SHARE_TAG + distance,
        )  # fmt: skip
        return _Home(exchange=exchange, runs=runs, dk_BGND=dk, dv_BGNE=dv)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Home:
    """What another rank has added to the gradients of this rank's rows, on its way."""

    exchange: Exchange
    runs: tuple[Run, ...]
    dk_BGND: Tensor
    dv_BGNE: Tensor

    def settle(self, sums: Sums) -> None:
        self.exchange.wait()
        for run, packed in zip(self.runs, _packed(self.runs), strict=True):
            here = slice(packed.offset, packed.offset + packed.length)
            sums.dk.add(run, self.dk_BGND[:, :, here])
            sums.dv.add(run, self.dv_BGNE[:, :, here])


def _buffer(k: Tensor, v: Tensor) -> Tensor:
    """The buffer that both are views of, one after the other."""
    return torch.as_strided(k, (k.numel() + v.numel(),), (1,), k.storage_offset())


def forward(
    problem: Problem, q_BHQD: Tensor, k_BGKD: Tensor, v_BGKE: Tensor, *, ahead: int
) -> tuple[Tensor, Tensor]:
    """The output of the local queries over all keys that they attend, and its logsumexp."""
    output = Output.empty(problem, q_BHQD, v_BGKE.shape[-1])
    rank = problem.ranks.rank
    mine, rows = problem.q_runs(rank), _Rows(problem=problem, k_BGKD=k_BGKD, v_BGKE=v_BGKE)
    arriving = rows.arriving("forward: K/V", ahead=ahead)
    attend(problem, output, q_BHQD, k_BGKD, v_BGKE, mine, problem.k_runs(rank))
    for _, parcel in arriving:
        attend(problem, output, q_BHQD, parcel.k_BGND, parcel.v_BGNE, mine, parcel.runs)
    return output.finish()


def backward(
    problem: Problem,
    dout_BHQE: Tensor,
    q_BHQD: Tensor,
    k_BGKD: Tensor,
    v_BGKE: Tensor,
    out_BHQE: Tensor,
    lse_BHQ: Tensor,
    *,
    ahead: int,
) -> Gradients:
    """The gradients of the local queries, keys and values."""
    sums = Sums.empty(problem, q_BHQD, k_BGKD, v_BGKE)
    rank, accumulated_in = problem.ranks.rank, accumulation_dtype(k_BGKD.dtype)
    mine, rows = problem.q_runs(rank), _Rows(problem=problem, k_BGKD=k_BGKD, v_BGKE=v_BGKE)

    def add(part: Sums, k: Tensor, v: Tensor, runs: Sequence[Run]) -> None:
        given = (dout_BHQE, q_BHQD, k, v, out_BHQE, lse_BHQ)
        attend_backward(problem, part, *given, mine, runs)

    arriving = rows.arriving("backward: K/V", ahead=ahead)
    add(sums, k_BGKD, v_BGKE, problem.k_runs(rank))
    under_way: deque[_Home] = deque()
    for distance, parcel in arriving:
        part = sums.with_keys(*rows.like(parcel.runs, accumulated_in))
        add(part, parcel.k_BGND, parcel.v_BGNE, parcel.runs)
        under_way.append(rows.send_home(distance, part.dk.finish(), part.dv.finish()))
        while len(under_way) > ahead:
            under_way.popleft().settle(sums)
    for home in under_way:
        home.settle(sums)
    return sums.finish()


# --- what it costs -------------------------------------------------------------------------------


def time(local: Local, profile: Profile, direction: Direction, pick: Pick, *, ahead: int) -> Phase:
    """With t_d the kernel's time at distance d (0: its own keys), m_d the rows that travel so far:

    ahead = 0    sum t_d + sum m_d                       every message is exposed
    else         sum over d of max(t_before, m_d)        each hides behind what is computed then

    and in backward the gradients of the rows on their way home, beside what is computed next.
    """
    hops = _hop_table(local, profile, pick, direction)
    far = distances(local.site.spec, local.q_layout, local.kv_layout)
    compute_s = hops[0] + sum(hops[d] for d in far)
    rows = [_most_rows(local, d) for d in far]
    there = [_message(local, profile, n, local.itemsize) for n in rows]
    home = [_message(local, profile, n, local.accumulator_bytes) for n in rows]
    home = home if direction == "backward" else []
    total = sum(seconds for seconds, _ in (*there, *home))
    if ahead == 0:
        return Phase(compute_s=compute_s, communication_s=total, exposed_s=total)
    behind = [hops[d] for d in (0, *far)]
    exposed = sum(exposed_seconds(profile, t, *m) for t, m in zip(behind, there, strict=False))
    exposed += sum(exposed_seconds(profile, t, *m) for t, m in zip(behind[2:], home, strict=False))
    exposed += sum(seconds for seconds, _ in home[-1:])
    return Phase(compute_s=compute_s, communication_s=total, exposed_s=exposed)


def _hop_table(local: Local, profile: Profile, pick: Pick, direction: Direction) -> list[float]:
    """Seconds of each distance, 0 first."""
    found = [seconds for seconds, times in hop_seconds(local, profile, pick, direction)
             for _ in range(times)]  # fmt: skip
    return found + [0.0] * (local.world_size - len(found))


def _most_rows(local: Local, distance: int) -> int:
    """Rows that any rank receives from so far away."""
    size, spec = local.world_size, local.site.spec
    return max(
        _count(needed_rows(spec, local.q_layout, local.kv_layout, (r - distance) % size, r))
        for r in some_ranks(size)
    )


def _message(local: Local, profile: Profile, rows: int, item: int) -> tuple[float, int]:
    """Seconds and bytes of so many rows of K and V."""
    site = local.site
    size = site.batch * site.kv_heads * rows * (site.head_dim + site.v_head_dim) * item
    return (message_seconds(profile, "send_recv", local.world_size, size) if rows else 0.0), size


def memory(local: Local, calls: Calls, *, ahead: int) -> Iterator[int]:
    """The sums and the parcels under way: sent, arriving and, in backward, their gradients."""
    far = distances(local.site.spec, local.q_layout, local.kv_layout)
    rows = max((_most_rows(local, d) for d in far), default=0)
    width = local.site.head_dim + local.site.v_head_dim
    items = local.site.batch * local.site.kv_heads * rows * width
    parcels = min(len(far), ahead + 1) * 2 * items * local.itemsize
    table = ring_work(local.site.spec, local.layout, local.world_size, MASKED_TILE, local.kept)
    call = calls.of([work for row in table.rows for work in row], 1)
    if calls.direction == "forward":
        yield sums_forward(local) + parcels + call
        yield from output_moments(local)
    else:
        homes = min(len(far), ahead + 1) * 2 * items * local.accumulator_bytes
        yield sums_backward(local) + parcels + homes + call
        yield from gradient_moments(local)
