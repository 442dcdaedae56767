"""Heads for tokens: an all-to-all gives each rank all tokens of its share of the heads.

Each rank then runs plain attention over whole sequences, and a second all-to-all brings the output
back (Jacobs et al., DeepSpeed-Ulysses). Heads are worked through in groups, so that what is held by
heads is a group's only. Where there are fewer K/V heads than ranks, or they do not divide, each is
repeated until they do; the gradients of the copies are added.

Shapes: B batch, H query heads, G key/value heads, Q local tokens, S all tokens (padded), D any head
dim, P ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ringfx.comm.process_group import Ranks
from ringfx.cost_model.prediction.footprint import Calls, sums_forward
from ringfx.cost_model.prediction.formulas import Phase, whole_seconds
from ringfx.cost_model.prediction.profile import Profile
from ringfx.cost_model.prediction.profile_rows import Direction
from ringfx.cost_model.prediction.rank_share import Local
from ringfx.cost_model.prediction.strategy import Refusal, Strategy
from ringfx.cost_model.prediction.terms import message_seconds
from ringfx.cost_model.prediction.work import Work, whole_work
from ringfx.ir.dilation import AnyLayout
from ringfx.ir.kernel_table import Pick
from ringfx.ir.values import AttentionSite
from ringfx.ops.kernels.kernel import accumulation_dtype
from ringfx.ops.kernels.logsumexp import digits
from ringfx.ops.tiling.attention_call import Problem
from ringfx.ops.tiling.head_groups import MOST_GROUPS
from ringfx.ops.tiling.merge import Gradients
from ringfx.strategies import local as one_rank

__all__ = ["ULYSSES"]

Tensor = torch.Tensor


GROUP_BYTES: Mapping[str, int] = {"cpu": 4 << 20}
"""Of q on one rank, at least, in one exchange: a message to each other rank is a p-th of it."""
GROUP_BYTES_ELSEWHERE = 256 << 20
"""A GPU's kernel needs many heads at once to fill the device."""


@dataclass(frozen=True)
class _Groups:
    """How a rank's share of the heads is worked through, group by group.

    K/V heads come in ``of_kv`` groups, and the query heads of each in ``of_q``: more than one where
    a group is a single K/V head already. Only what is equal on all ranks decides.
    """

    of_kv: int
    of_q: int

    @staticmethod
    def of(heads: int, kv_heads: int, most: int) -> _Groups:
        """At most so many in all, of a share of so many heads."""
        of_kv = _largest_divisor(kv_heads, most)
        if of_kv < kv_heads:
            return _Groups(of_kv, 1)
        return _Groups(of_kv, _largest_divisor(heads // kv_heads, most // of_kv))

    @property
    def count(self) -> int:
        return self.of_kv * self.of_q


def _largest_divisor(number: int, most: int) -> int:
    return max(n for n in range(1, max(1, most) + 1) if number % n == 0)


def _groups(
    heads: int,
    kv_heads: int,
    ranks: int,
    q_bytes: int,
    device: str,
    pairs_a_thread: int,
    asked: int,
) -> _Groups:
    """For all heads of a layer, of whose (batch, head) pairs each thread has so many: one at least
    is left to it in every group. ``asked``: so many groups, where the heads can be parted so."""
    least = GROUP_BYTES.get(device, GROUP_BYTES_ELSEWHERE)
    most = asked or min(MOST_GROUPS, q_bytes // least, pairs_a_thread)
    share, kv_share = heads // ranks, kv_heads * _copies(kv_heads, ranks) // ranks
    return _Groups.of(share, kv_share, most)


def _parts(share: int, count: int) -> list[slice]:
    size = share // count
    return [slice(i * size, (i + 1) * size) for i in range(count)]


@dataclass(frozen=True, eq=False)
class _Exchange:
    """Some heads of each rank's share, by tokens on their owners and by heads here."""

    ranks: Ranks
    layout: AnyLayout
    share: int
    """Heads of a rank."""
    part: slice
    """Those of them that are exchanged."""
    copies: int = 1
    """How often each head of ``to_heads`` counts: ranks that hold one have copies of it."""

    def _of(self, rank: int) -> slice:
        first = rank * self.share
        return slice(first + self.part.start, first + self.part.stop)

    def to_heads(self, operation: str, x_BHQD: Tensor) -> Tensor:
        """[B, H, Q, D] on each rank -> [B, part, S, D]: all tokens, in order of position."""
        B, _, _, D = x_BHQD.shape
        heads, layout = self.part.stop - self.part.start, self.layout
        whole_BHSD = x_BHQD.new_empty(B, heads, layout.padded_length, D)

        def of_heads(rank: int) -> Tensor:
            return _repeated(x_BHQD, self._of(rank), self.copies)

        def place(rank: int, part_BHQD: Tensor) -> None:
            for there, here in layout.chunks(rank):
                whole_BHSD[:, :, there] = part_BHQD[:, :, here]

        place(self.ranks.rank, of_heads(self.ranks.rank))
        for rank, part_BHQD in self.ranks.iter_all_to_all(operation, of_heads):
            place(rank, part_BHQD)
        return whole_BHSD

    def to_tokens(self, operation: str, x_BHSD: Tensor, *into_BHQD: Tensor) -> None:
        """The inverse: [B, part, S, D] -> these heads of [B, H, Q, D], its columns in several."""
        B, heads, _, D = x_BHSD.shape
        layout = self.layout

        def of_tokens(rank: int) -> Tensor:
            part_BHQD = x_BHSD.new_empty(B, heads, layout.local_length, D)
            for there, here in layout.chunks(rank):
                part_BHQD[:, :, here] = x_BHSD[:, :, there]
            return part_BHQD

        def place(rank: int, part_BHQD: Tensor) -> None:
            columns = part_BHQD.split([x.shape[3] for x in into_BHQD], dim=3)
            for whole_BHQD, given_BHQD in zip(into_BHQD, columns, strict=True):
                whole_BHQD[:, self._of(rank)] = given_BHQD

        place(self.ranks.rank, of_tokens(self.ranks.rank))
        for rank, part_BHQD in self.ranks.iter_all_to_all(operation, of_tokens):
            place(rank, part_BHQD)


@dataclass(frozen=True, eq=False)
class _Call:
    """One layer's call: its heads in groups, and how they are exchanged."""

    problem: Problem
    groups: _Groups
    share: int
    kv_share: int
    copies: int

    @staticmethod
    def of(problem: Problem, q_BHQD: Tensor, k_BGKD: Tensor) -> _Call:
        size, heads, kv_heads = problem.ranks.size, q_BHQD.shape[1], k_BGKD.shape[1]
        device, pairs = q_BHQD.device.type, q_BHQD.shape[0] * heads // size
        threads = problem.ranks.fewest_threads() if device == "cpu" else 1
        q_bytes = q_BHQD.numel() * q_BHQD.element_size()
        asked = problem.head_groups
        groups = _groups(heads, kv_heads, size, q_bytes, device, pairs // threads, asked)
        copies = _copies(kv_heads, size)
        return _Call(problem, groups, heads // size, kv_heads * copies // size, copies)

    def kv_parts(self) -> Iterator[tuple[_Exchange, list[slice]]]:
        """Groups of K/V heads, each with its groups of query heads, numbered in the share."""
        size = self.share // self.groups.of_kv
        for number, part in enumerate(_parts(self.kv_share, self.groups.of_kv)):
            first = number * size
            of_q = _parts(size, self.groups.of_q)
            yield self._kv(part), [slice(first + q.start, first + q.stop) for q in of_q]

    def _kv(self, part: slice) -> _Exchange:
        ranks, layout = self.problem.ranks, self.problem.kv_layout
        return _Exchange(ranks, layout, self.kv_share, part, self.copies)

    def q(self, part: slice) -> _Exchange:
        return _Exchange(self.problem.ranks, self.problem.q_layout, self.share, part)

    def alone(self, part: slice) -> Problem:
        """All tokens of these heads, as one rank alone computes them."""
        ranks = self.problem.ranks
        return replace(
            self.problem, ranks=Ranks(0, 1, None, ranks.layer), layout="contiguous",
            first_head=ranks.rank * self.share + part.start,
        )  # fmt: skip


def _copies(kv_heads: int, ranks: int) -> int:
    """How often each K/V head is repeated so that the ranks divide them."""
    return math.lcm(kv_heads, ranks) // kv_heads


def forward(
    problem: Problem, q_BHQD: Tensor, k_BGKD: Tensor, v_BGKE: Tensor
) -> tuple[Tensor, Tensor]:
    """The output of the local queries over all keys and its logsumexp."""
    call = _Call.of(problem, q_BHQD, k_BGKD)
    E = v_BGKE.shape[3]
    by_tokens: tuple[Tensor, Tensor] | None = None
    for kv, q_parts in call.kv_parts():
        for found, part in _outputs(call, kv, q_parts, (k_BGKD, v_BGKE), q_BHQD):
            if by_tokens is None:
                shape = q_BHQD.shape[:3]
                by_tokens = found.new_empty(*shape, E), found.new_empty(*shape, found.shape[3] - E)
            call.q(part).to_tokens("forward: all-to-all of the output", found, *by_tokens)
            del found
    assert by_tokens is not None, "there is one group at least"
    out_BHQE, digits_BHQN = by_tokens
    return out_BHQE, digits_BHQN.to(problem.logsumexp_dtype(q_BHQD.dtype)).sum(-1)


def _outputs(
    call: _Call, kv: _Exchange, q_parts: Sequence[slice], k_and_v: Sequence[Tensor], q_BHQD: Tensor
) -> Iterator[tuple[Tensor, slice]]:
    """Of some K/V heads the output by heads, for one group of query heads after the other."""
    k, v = (
        kv.to_heads(f"forward: all-to-all of {name}", x)
        for name, x in zip("kv", k_and_v, strict=True)
    )
    for number, part in enumerate(q_parts):
        q = call.q(part).to_heads("forward: all-to-all of q", q_BHQD)
        found = _with_logsumexp(*one_rank.forward(call.alone(part), q, k, v))
        del q
        if number == len(q_parts) - 1:
            del k, v  # before the output by tokens is made
        yield found, part
        del found  # before the next group's is made


def _with_logsumexp(out_BHSE: Tensor, lse_BHS: Tensor) -> Tensor:
    """The output, and in last columns its logsumexp: one message for both."""
    return torch.cat([out_BHSE, torch.stack(digits(lse_BHS, out_BHSE.dtype), dim=-1)], dim=-1)


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
    call = _Call.of(problem, q_BHQD, k_BGKD)
    rows = {"q": q_BHQD, "the output": out_BHQE, "dout": dout_BHQE}
    rows["the logsumexp"] = lse_BHQ[..., None]
    dq = _Late(q_BHQD)
    dk, dv = (_Late(x, call.copies) for x in (k_BGKD, v_BGKE))
    inputs: Sequence[Tensor | None] = ()
    for kv, q_parts in call.kv_parts():
        of_keys: tuple[Tensor, Tensor] | None = None
        for found, part in _of_group(call, kv, q_parts, (k_BGKD, v_BGKE), rows):
            call.q(part).to_tokens("backward: all-to-all of dq", found.dq_BHQD, dq.made())
            inputs = _added(inputs, found.inputs)
            if of_keys is None:
                of_keys = found.dk_BGKD, found.dv_BGKE
            else:
                of_keys[0].add_(found.dk_BGKD)
                of_keys[1].add_(found.dv_BGKE)
            del found
        assert of_keys is not None, "there is one group at least"
        for name, x, total in zip(("dk", "dv"), of_keys, (dk, dv), strict=True):
            kv.to_tokens(f"backward: all-to-all of {name}", x, total.made())
    return Gradients(
        dq.made(), _add_copies(dk.made(), call.copies), _add_copies(dv.made(), call.copies), inputs
    )


@dataclass(eq=False)
class _Late:
    """A gradient by tokens, of every copy of a head. Its memory is taken when it is first asked."""

    like: Tensor
    copies: int = 1
    total: Tensor | None = None

    def made(self) -> Tensor:
        if self.total is None:
            made_in = accumulation_dtype(self.like.dtype)
            B, heads, *rest = self.like.shape
            self.total = self.like.new_empty((B, heads * self.copies, *rest), dtype=made_in)
        return self.total


def _of_group(
    call: _Call,
    kv: _Exchange,
    q_parts: Sequence[slice],
    k_and_v: Sequence[Tensor],
    rows: Mapping[str, Tensor],
) -> Iterator[tuple[Gradients, slice]]:
    """Of some K/V heads the gradients by heads, for one group of query heads after the other."""
    k, v = (
        kv.to_heads(f"backward: all-to-all of {name}", x)
        for name, x in zip("kv", k_and_v, strict=True)
    )
    for number, part in enumerate(q_parts):
        q, out, dout, lse = (
            call.q(part).to_heads(f"backward: all-to-all of {name}", x) for name, x in rows.items()
        )
        found = one_rank.backward(call.alone(part), dout, q, k, v, out, lse[..., 0])
        del q, out, dout, lse
        if number == len(q_parts) - 1:
            del k, v  # before gradients by tokens are made
        yield found, part
        del found  # before the next group's is made


def _added(total: Sequence[Tensor | None], more: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients of captured tensors, of which each group of heads has a part."""
    if not total:
        return list(more)
    return [
        a if b is None else b if a is None else a.add_(b) for a, b in zip(total, more, strict=True)
    ]


def _repeated(x_BGKD: Tensor, heads: slice, copies: int) -> Tensor:
    """These heads of ``x.repeat_interleave(copies, 1)``, without making the others."""
    if copies == 1:
        return x_BGKD[:, heads]
    given = [h // copies for h in range(heads.start, heads.stop)]
    return torch.cat([x_BGKD[:, h : h + 1] for h in given], dim=1)


def _add_copies(x_BHKD: Tensor, copies: int) -> Tensor:
    return x_BHKD if copies == 1 else x_BHKD.unflatten(1, (-1, copies)).sum(2)


# --- where it can run -----------------------------------------------------------------------------


def admits(site: AttentionSite, world_size: int) -> Refusal | None:
    if site.row_bytes:
        return Refusal(
            reason='"ulysses" computes all queries of some heads, and each rank has only its own '
            "queries' rows of the scores that are added to them",
            remedy='use "production" or "collective"',
        )
    if site.heads % world_size == 0:
        return None
    divisors = [str(p) for p in range(2, site.heads + 1) if site.heads % p == 0]
    ranks = f"a number of ranks that divides them ({', '.join(divisors)})" if divisors else "1 rank"
    return Refusal(
        reason=f'"ulysses" needs heads % ranks == 0; here {site.heads} heads, {world_size} ranks',
        remedy=f'use {ranks}, or "production"',
    )


# --- what it costs -------------------------------------------------------------------------------


def time(local: Local, profile: Profile, direction: Direction, pick: Pick) -> Phase:
    """Tokens for heads, whole sequences at once, and back; K/V heads repeated until p divides them.

    In groups of heads, one after the other:

    forward     t + x(q) + x(k) + x(v) + x(out, lse)
    backward    t + x(q, out, dout, lse) + x(k) + x(v) + x(dq) + x(dk) + x(dv)
    """
    p, groups = local.world_size, _groups_of(local)
    share = 1 / p / groups.count
    compute_s = groups.count * whole_seconds(local, profile, pick, direction, share)
    rows, of_kv = _exchanged(local, direction)
    messages_s = sum(
        times * message_seconds(profile, "all_to_all", p, (p - 1) / p * size / times)
        for sizes, times in ((rows, groups.count), (of_kv, groups.of_kv))
        for size in sizes
    )
    return Phase(compute_s=compute_s, communication_s=messages_s, exposed_s=messages_s)


def _groups_of(local: Local) -> _Groups:
    site, q_bytes = local.site, local.q_items * local.itemsize
    pairs = max(1, site.batch * site.heads // local.world_size)
    asked = local.head_groups
    return _groups(site.heads, site.kv_heads, local.world_size, q_bytes, site.device, pairs, asked)


def num_groups(local: Local) -> int:
    """Groups of heads, as ``forward`` makes them on threads enough."""
    return _groups_of(local).count


def _exchanged(local: Local, direction: Direction) -> tuple[Sequence[int], Sequence[int]]:
    """Bytes of each all-to-all of queries' rows, and of K/V: what is summed goes in float32."""
    e, a = local.itemsize, local.accumulator_bytes
    if direction == "forward":
        return (local.q_items * e, (local.out_items + local.rows) * a), _exchanged_kv(local, e)
    there = (local.q_items * e, local.out_items * e, local.out_items * e, local.rows * a)
    return (*there, local.q_items * a), (*_exchanged_kv(local, e), *_exchanged_kv(local, a))


def _exchanged_kv(local: Local, size: int) -> tuple[int, int]:
    copies = _copies(local.site.kv_heads, local.world_size)
    return copies * local.k_items * size, copies * local.v_items * size


def memory(local: Local, calls: Calls) -> Iterator[int]:
    """Bytes held, moment by moment."""
    return (_forward_moments if calls.direction == "forward" else _backward_moments)(local, calls)


def _forward_moments(local: Local, calls: Calls) -> Iterator[int]:
    """With n groups, m of them of K/V: q e / n + c kv e / m by heads and (o + r) a / n of output.

    Beside them the call over whole sequences, or the output once more. Then all of it by tokens,
    which is there from the first group on.
    """
    groups, sums = _groups_of(local), sums_forward(local)
    kv = _copies(local.site.kv_heads, local.world_size) * local.kv_items
    by_heads = local.q_items * local.itemsize // groups.count + kv * local.itemsize // groups.of_kv
    output = sums // groups.count
    before = sums if groups.count > 1 else 0
    call = calls.of(_works(local), 1 / local.world_size / groups.count)
    yield before + by_heads + output + max(call, output)
    yield sums + output


def _works(local: Local) -> Iterator[Work]:
    """Whole sequences, of each part of a dilated attention."""
    return (whole_work(part.site.spec) for _, part in local.parts)


def _backward_moments(local: Local, calls: Calls) -> Iterator[int]:
    """(q + 2 o) e / n + r a / n + c kv e / m by heads and q a / n + c kv a / m of gradients.

    Beside them the call over whole sequences; or gradients by tokens, which are there from the
    first group on. Where query heads of one K/V head are parted, its gradients are there twice.
    """
    groups, a = _groups_of(local), local.accumulator_bytes
    kv = _copies(local.site.kv_heads, local.world_size) * local.kv_items
    rows = (local.q_items + 2 * local.out_items) * local.itemsize + local.rows * a
    by_heads = rows // groups.count + kv * local.itemsize // groups.of_kv
    sums = local.q_items * a // groups.count + kv * a // groups.of_kv * min(2, groups.of_q)
    before = local.q_items * a * (groups.count > 1) + kv * a * (groups.of_kv > 1)
    yield before + by_heads + sums + calls.of(_works(local), 1 / local.world_size / groups.count)
    yield (
        sums + (local.q_items + kv) * a + 2 * local.q_items * a // local.world_size // groups.count
    )


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
    num_groups=num_groups,
)
