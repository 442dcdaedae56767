"""Messages of sharded states, each in two halves: what lies between them runs meanwhile.

``begin_*`` starts a message, and its result is not to be read; ``finish_*`` waits for it.
``after`` is not read: what stands there begins before, in whatever order a compiler runs the rest
(``ringfx.compile.prefetch`` puts the next message there).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ringfx.comm.double_backward import refuse_double_backward
from ringfx.comm.pending import Pending
from ringfx.comm.process_group import Ranks

__all__ = ["begin_gather", "begin_scatter", "finish_gather", "finish_scatter"]

Tensor = torch.Tensor

WHERE = "outside attention"
"""The layer under which these messages are counted."""

_GATHERS = Pending("an all-gather of parameters")
_SUMS = Pending("a reduce-scatter of gradients")


@torch.library.custom_op("ringfx::begin_gather", mutates_args=())
def begin_gather(part: Tensor, ranks: int, group: str, what: str) -> Tensor:
    """Everyone's part, [ranks, *part.shape]; as bytes, so that any type travels."""
    raw = part.contiguous().view(-1).view(torch.uint8)
    operation = f"all-gather of {what}"
    whole, wait = Ranks.named(group, WHERE).begin_all_gather(operation, raw)
    gathered = whole.view(-1).view(part.dtype).view(ranks, *part.shape)
    _GATHERS.begin(gathered, wait)
    return gathered


@begin_gather.register_fake
def _(part: Tensor, ranks: int, group: str, what: str) -> Tensor:
    return part.new_empty(ranks, *part.shape)


@torch.library.custom_op("ringfx::finish_gather", mutates_args=())
def finish_gather(gathered: Tensor, sizes: Sequence[int], after: Sequence[Tensor]) -> list[Tensor]:
    """[ranks, size] of each parameter, in storage of its own; ``gathered`` is [ranks, sizes]."""
    _GATHERS.finish(gathered)
    return [
        piece.clone(memory_format=torch.contiguous_format)
        for piece in gathered.split(list(sizes), 1)
    ]


@finish_gather.register_fake
def _(gathered: Tensor, sizes: Sequence[int], after: Sequence[Tensor]) -> list[Tensor]:
    return [gathered.new_empty(gathered.shape[0], size) for size in sizes]


@torch.library.custom_op("ringfx::begin_scatter", mutates_args=())
def begin_scatter(parts: Tensor, group: str, what: str) -> Tensor:
    """Where the sum over ranks of this rank's part arrives, [size]; ``parts`` is [ranks, size]."""
    operation = f"reduce-scatter of the gradient of {what}"
    arriving, wait = Ranks.named(group, WHERE).begin_reduce_scatter(operation, parts.contiguous())
    _SUMS.begin(arriving, wait)
    return arriving


@begin_scatter.register_fake
def _(parts: Tensor, group: str, what: str) -> Tensor:
    return parts.new_empty(parts.shape[1:])


@torch.library.custom_op("ringfx::finish_scatter", mutates_args=())
def finish_scatter(arriving: Tensor, parts: Tensor, after: Sequence[Tensor]) -> Tensor:
    """The sum over ranks, [size]; ``parts`` are being sent: no compiler may reuse them before."""
    _SUMS.finish(arriving)
    return arriving.clone()


@finish_scatter.register_fake
def _(arriving: Tensor, parts: Tensor, after: Sequence[Tensor]) -> Tensor:
    return torch.empty_like(arriving)


for _operator in (begin_gather, finish_gather, begin_scatter, finish_scatter):
    refuse_double_backward(_operator)
