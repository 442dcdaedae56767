"""Every message outside attention: operators that compilers take as they are.

Each names what it moves, so that a rank that does not answer is an error with the operation's name
within the group's timeout, under every compiler and in backward too. Fake implementations need no
process group: shapes are the same on every rank.

``begin_sum`` and ``finish_sum`` are the two halves of an all-reduce. What lies between them in a
program runs while the message travels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from ringfx.comm.double_backward import refuse_double_backward
from ringfx.comm.grad_accumulation import parts_to_send
from ringfx.comm.pending import Pending
from ringfx.comm.process_group import Ranks

__all__ = [
    "WHERE", "all_gather", "all_reduce", "begin_sum", "finish_sum", "largest", "reduce_scatter",
    "take_part",
]  # fmt: skip

Tensor = torch.Tensor

WHERE = "outside attention"
"""The layer under which these messages are counted."""


@torch.library.custom_op("ringfx::all_gather", mutates_args=())
def all_gather(x: Tensor, ranks: int, group: str, what: str) -> Tensor:
    """Everyone's tensor, [ranks, *x.shape]; as bytes, so that any type travels."""
    raw = x.contiguous().view(-1).view(torch.uint8)
    gathered = _ranks(group).all_gather(f"all-gather of {what}", raw)
    return gathered.view(-1).view(x.dtype).view(ranks, *x.shape)


@all_gather.register_fake
def _(x: Tensor, ranks: int, group: str, what: str) -> Tensor:
    return x.new_empty(ranks, *x.shape)


@torch.library.custom_op("ringfx::reduce_scatter", mutates_args=())
def reduce_scatter(parts: Tensor, group: str, what: str) -> Tensor:
    """The sum over ranks of this rank's part; ``parts`` is [ranks, ...]."""
    operation = f"reduce-scatter of the gradient of {what}"
    return _ranks(group).reduce_scatter(operation, parts)


@reduce_scatter.register_fake
def _(parts: Tensor, group: str, what: str) -> Tensor:
    return parts.new_empty(parts.shape[1:])


@torch.library.custom_op("ringfx::all_reduce", mutates_args=())
def all_reduce(x: Tensor, group: str, what: str) -> Tensor:
    """The sum over ranks."""
    total = _ranks(group).all_reduce(f"all-reduce of {what}", _real(x).clone())
    return torch.view_as_complex(total) if x.is_complex() else total


@all_reduce.register_fake
def _(x: Tensor, group: str, what: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("ringfx::largest", mutates_args=())
def largest(x: Tensor, group: str, what: str) -> Tensor:
    """The largest over ranks of each element; NaN of some rank may be lost."""
    return _ranks(group).largest(f"maximum of {what}", x.contiguous().clone())


@largest.register_fake
def _(x: Tensor, group: str, what: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_SUMS = Pending("a gradient all-reduce")


def _nothing() -> None:
    """What waits for a sum that is held back."""


def _begin(flat: Tensor, group: str, what: str) -> None:
    ranks, operation = _ranks(group), f"all-reduce of {what}"
    work = ranks.guarded(operation, "all ranks", lambda: ranks.start_sum(flat, async_op=True))
    _SUMS.begin(flat, partial(ranks.collective, operation, work.wait))


@torch.library.custom_op("ringfx::begin_sum", mutates_args=())
def begin_sum(
    parts: Sequence[Tensor], call: Tensor, members: Sequence[int], group: str, what: str
) -> Tensor:
    """Starts the all-reduce of all parts in one flat message; not to be read before its end.

    ``call`` and ``members`` say which parameters they belong to, see
    ``ringfx.comm.grad_accumulation``.
    """
    sent = parts_to_send(int(call), members, parts)
    if sent is None:
        flat = _real(parts[0]).new_zeros(sum(_real(part).numel() for part in parts))
        _SUMS.begin(flat, _nothing)
    else:
        flat = torch.cat([_real(part).reshape(-1) for part in sent])
        _begin(flat, group, what)
    return flat


@begin_sum.register_fake
def _(
    parts: Sequence[Tensor], call: Tensor, members: Sequence[int], group: str, what: str
) -> Tensor:
    return _real(parts[0]).new_empty(sum(_real(part).numel() for part in parts))


@torch.library.custom_op("ringfx::finish_sum", mutates_args=())
def finish_sum(flat: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Waits, and gives each part storage of its own."""
    _SUMS.finish(flat)
    return [part.clone() for part in flat.split(list(sizes))]


@finish_sum.register_fake
def _(flat: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    return [flat.new_empty(size) for size in sizes]


@torch.library.custom_op("ringfx::take_part", mutates_args=())
def take_part(parts: Tensor, group: str) -> Tensor:
    """This rank's of ``parts``, [ranks, ...]; nothing is sent."""
    return parts[_ranks(group).rank].clone()


@take_part.register_fake
def _(parts: Tensor, group: str) -> Tensor:
    return parts.new_empty(parts.shape[1:])


for _operator in (
    all_gather,
    reduce_scatter,
    all_reduce,
    largest,
    take_part,
    begin_sum,
    finish_sum,
):
    refuse_double_backward(_operator)


def _ranks(group: str) -> Ranks:
    return Ranks.named(group, WHERE)


def _real(x: Tensor) -> Tensor:
    """Complex numbers as pairs: backends sum real ones only."""
    return torch.view_as_real(x) if x.is_complex() else x.contiguous()
