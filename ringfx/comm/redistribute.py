"""Tokens from one split to another: each goes from the rank that has it to the one that wants it.

One dimension of a tensor may be split in two ways: by tokens of a line, and by rows of an image or
by blocks of tokens that an operator cuts it into. ``move_tokens`` takes it from one to the other: a
rank sends what it has of every other's part and nothing else. The transpose is the way back.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch

from ringfx.comm.autograd_function import register_autograd
from ringfx.comm.conjugate import choose_tokens
from ringfx.comm.process_group import Ranks, Transfer
from ringfx.ir.layout import Layout, LayoutKind

__all__ = ["Spread", "move_tokens", "reshard"]

KINDS: tuple[LayoutKind, ...] = ("contiguous", "zigzag")


def reshard(x: torch.Tensor, dim: int, ends: bool = False) -> torch.Tensor:
    """The value itself: from here on ``dim`` is another token axis, or with ``ends`` none."""
    same: torch.Tensor = torch.ops.aten.alias.default(x)
    return same


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How a dimension [outer, tokens, inner] is split; plain numbers, for a graph.

    Token i is at position ``offset + i`` of a layout of ``line`` positions.
    """

    kind: int
    """Of the layout, as an index of ``KINDS``."""
    line: int
    ranks: int
    offset: int
    length: int
    outer: int
    inner: int

    @property
    def layout(self) -> Layout:
        return Layout(KINDS[self.kind], self.line, self.ranks)

    @property
    def local(self) -> int:
        """Elements of the dimension on each rank."""
        return self.outer * self.layout.local_length * self.inner

    def elements(self, rank: int) -> torch.Tensor:
        """int64 [local]: the element that is in each place of a rank; -1 for padding."""
        own = self.layout.positions(rank) - self.offset
        rows = torch.arange(self.outer)[:, None, None] * self.length + own[:, None]
        places = rows * self.inner + torch.arange(self.inner)
        there = ((own >= 0) & (own < self.length))[:, None]
        return torch.where(there, places, -1).flatten()

    def numbers(self) -> list[int]:
        return list(astuple(self))

    @staticmethod
    def of(numbers: Sequence[int]) -> Spread:
        kind, line, ranks, offset, length, outer, inner = numbers
        return Spread(
            kind=kind, line=line, ranks=ranks, offset=offset, length=length, outer=outer,
            inner=inner,
        )  # fmt: skip


@functools.lru_cache(maxsize=64)
def _routes(
    here: Spread, there: Spread, rank: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """For each rank the places here of what it is sent, and there of what it sends."""
    size = here.outer * here.length * here.inner
    send = [_places(here, rank, size)[_wanted(there, r)] for r in range(here.ranks)]
    wanted = _wanted(there, rank)
    slots = (there.elements(rank) >= 0).nonzero().flatten()
    receive = [slots[_places(here, r, size)[wanted] >= 0] for r in range(here.ranks)]
    return [places[places >= 0] for places in send], receive


def _wanted(spread: Spread, rank: int) -> torch.Tensor:
    elements = spread.elements(rank)
    return elements[elements >= 0]


def _places(spread: Spread, rank: int, size: int) -> torch.Tensor:
    """int64 [size]: where a rank has each element; -1 where it has not."""
    elements = spread.elements(rank)
    at = (elements >= 0).nonzero().flatten()
    return torch.full((size,), -1).scatter(0, elements[at], at)


@torch.library.custom_op("ringfx::exchange_tokens", mutates_args=())
def _exchange(
    x: torch.Tensor, here: Sequence[int], there: Sequence[int], dim: int, group: str, what: str
) -> torch.Tensor:
    """This rank's part of dimension ``dim`` as ``there`` splits it; zero where it is padding."""
    ranks, before, after = Ranks.named(group, "exchange"), Spread.of(here), Spread.of(there)
    send, receive = _routes(before, after, ranks.rank)
    rows = x.movedim(dim, 0)
    result = rows.new_zeros(after.local, *rows.shape[1:])
    result[receive[ranks.rank].to(x.device)] = rows[send[ranks.rank].to(x.device)]
    operations: list[Transfer] = []
    arriving: dict[int, torch.Tensor] = {}
    for peer in range(ranks.size):
        if peer == ranks.rank:
            continue
        if len(receive[peer]):
            arriving[peer] = _bytes(rows.new_empty(len(receive[peer]), *rows.shape[1:]))
            operations.append(Transfer(sends=False, buffer=arriving[peer], peer=peer))
        if len(send[peer]):
            parcel = _bytes(rows[send[peer].to(x.device)].contiguous())
            operations.append(Transfer(sends=True, buffer=parcel, peer=peer))
    if operations:
        operation = f"reshard of {what}"
        start = functools.partial(ranks.start, operations)
        for work in ranks.guarded(operation, "the ranks that have its tokens", start):
            ranks.guarded(operation, "the ranks that have its tokens", work.wait)
    for peer, raw in arriving.items():
        rows_there = raw.view(x.dtype).view(-1, *rows.shape[1:])
        result[receive[peer].to(x.device)] = rows_there
    return result.movedim(0, dim).contiguous()


def _bytes(x: torch.Tensor) -> torch.Tensor:
    """As bytes, so that any type travels."""
    return x.view(-1).view(torch.uint8)


@_exchange.register_fake
def _(
    x: torch.Tensor, here: Sequence[int], there: Sequence[int], dim: int, group: str, what: str
) -> torch.Tensor:
    return x.new_empty(*x.shape[:dim], Spread.of(there).local, *x.shape[dim + 1 :])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, ctx.here, ctx.there, ctx.dim, ctx.group, ctx.what = inputs


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    what = f"the gradient of {ctx.what}"
    back = _exchange(grad, ctx.there, ctx.here, ctx.dim, ctx.group, what)
    return back, None, None, None, None, None


register_autograd(_exchange, _backward, setup_context=_setup_context)


def move_tokens(
    x: torch.Tensor,
    here: Sequence[int],
    there: Sequence[int],
    valid: torch.Tensor | None,
    dim: int,
    group: str,
    what: str,
) -> torch.Tensor:
    """The same dimension split in another way.

    Parameters
    ----------
    here, there
        ``Spread.numbers`` of both.
    valid
        bool [local tokens there]: which are no padding; None where there is none. Padding takes a
        token of this rank, so that it is no unlikelier than others.
    """
    moved: torch.Tensor = _exchange(x, list(here), list(there), dim, group, what)
    if valid is None:
        return moved
    spread = Spread.of(there)
    other = x.detach().narrow(dim, 0, 1)
    return choose_tokens(moved, other, valid, dim, spread.outer, spread.inner)
