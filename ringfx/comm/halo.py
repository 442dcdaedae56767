"""Tokens of neighbouring ranks: shifts along a split line, and convolutions over it.

A rank holds runs of consecutive tokens, its chunks: one, or two under the zigzag layout. What looks
at a few neighbours needs only the borders of the runs before and after; these are sent from rank to
rank and nothing else is. The transpose sends gradients back the same way, which autograd
does by itself: the one operator here that moves data is linear, and its own transpose backwards.

Shapes are written [outer, tokens, inner], flattened into one dimension ``dim``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from ringfx.comm.autograd_function import register_autograd
from ringfx.comm.conjugate import choose_tokens, identity_grad_all_reduce, sum_partials
from ringfx.comm.process_group import Ranks, Transfer
from ringfx.comm.token_lookup import take_range

__all__ = [
    "convolution", "convolve_tokens", "fill_convolved", "joined_runs", "roll_tokens",
    "runs_between", "runs_seen", "shift_tokens",
]  # fmt: skip


@torch.library.custom_op("ringfx::shift_chunks", mutates_args=())
def _shift_chunks(x: torch.Tensor, step: int, group: str, fill: float = 0.0) -> torch.Tensor:
    """y[c] = x[c - step] over the chunks of all ranks, or ``fill`` where there is none.

    Parameters
    ----------
    x
        [chunks of this rank, ...]: one (contiguous layout) or two (zigzag), equal on all ranks.
    step
        1 or -1.
    """
    ranks = Ranks.named(group, "neighbours")
    chunks = x.shape[0]
    result = torch.full_like(x, fill, memory_format=torch.contiguous_format)
    x = x.contiguous()
    operations: list[Transfer] = []
    for slot in range(chunks):
        here = _chunk(ranks.rank, slot, chunks, ranks.size)
        to, from_ = here + step, here - step
        if 0 <= from_ < chunks * ranks.size:
            owner, its_slot = _owner(from_, ranks.size)
            if owner == ranks.rank:
                result[slot] = x[its_slot]
            else:
                operations.append(Transfer(sends=False, buffer=result[slot], peer=owner))
        if 0 <= to < chunks * ranks.size and _owner(to, ranks.size)[0] != ranks.rank:
            operations.append(Transfer(sends=True, buffer=x[slot], peer=_owner(to, ranks.size)[0]))
    if operations:
        works = ranks.guarded("halo exchange", "its neighbours", lambda: ranks.start(operations))
        for work in works:
            ranks.guarded("halo exchange", "its neighbours", work.wait)
    return result


def _chunk(rank: int, slot: int, chunks: int, ranks: int) -> int:
    """The number of a rank's chunk along the line."""
    return rank if slot == 0 else chunks * ranks - 1 - rank


def _owner(chunk: int, ranks: int) -> tuple[int, int]:
    """The rank that holds a chunk, and which of its chunks it is."""
    return (chunk, 0) if chunk < ranks else (2 * ranks - 1 - chunk, 1)


@_shift_chunks.register_fake
def _(x: torch.Tensor, step: int, group: str, fill: float = 0.0) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, ctx.step, ctx.group, _ = inputs


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    return _shift_chunks(grad, -ctx.step, ctx.group), None, None, None


register_autograd(_shift_chunks, _backward, setup_context=_setup_context)


def _extended(
    x: torch.Tensor,
    before: int,
    after: int,
    chunks: int,
    group: str,
    dim: int,
    outer: int,
    fill: float = 0.0,
) -> torch.Tensor:
    """[chunks, leading, before + tokens of a chunk + after, rest]: each run with its neighbours.

    ``fill`` stands beyond the ends of the line.
    """
    leading = outer * x.shape[:dim].numel()
    tokens = x.shape[dim] // outer
    rest = x.shape[dim + 1 :].numel()
    runs = x.reshape(leading, chunks, tokens // chunks, rest).transpose(0, 1)
    parts = [runs]
    if before:
        last = runs[:, :, runs.shape[2] - before :].contiguous()
        parts.insert(0, _shift_chunks(last, 1, group, fill))
    if after:
        parts.append(_shift_chunks(runs[:, :, :after].contiguous(), -1, group, fill))
    return torch.cat(parts, 2)


def shift_tokens(
    x: torch.Tensor,
    by: int,
    valid: torch.Tensor,
    chunks: int,
    group: str,
    dim: int,
    outer: int,
    inner: int,
) -> torch.Tensor:
    """y[position] = x[position + by], by at most a chunk's length, where a token is ``valid``.

    Elsewhere another token of this rank: what comes from beyond the line's ends is zero, and so is
    the difference of a token and itself, which a model that divides by it would make NaN.
    """
    shape = x.shape
    rest = inner * shape[dim + 1 :].numel()
    opened = x.reshape(*shape[:dim], shape[dim] // inner, rest)
    before, after = max(-by, 0), max(by, 0)
    runs = _extended(opened, before, after, chunks, group, dim, outer)
    length = runs.shape[2] - abs(by)
    moved = runs.narrow(2, after, length).transpose(0, 1).reshape(shape)
    return choose_tokens(moved, _another(x, dim, outer, inner), valid, dim, outer, inner)


def roll_tokens(
    x: torch.Tensor,
    by: int,
    units: int,
    own: torch.Tensor,
    length: int,
    chunks: int,
    group: str,
    dim: int,
    inner: int,
    what: str,
) -> torch.Tensor:
    """y[e] = x[e + by] over the elements e of dimension ``dim``, counted round the axis.

    What stands at the other end of the axis comes from the ranks that have it, as a sum with zeros;
    padding takes some of that.

    Parameters
    ----------
    by
        At most half of the axis.
    units
        Tokens, of ``inner`` elements each, that hold ``abs(by)`` elements; at most a run's.
    own
        int64 [local tokens]: which token of the axis each local token is.
    length
        Tokens of the axis.
    """
    if by == 0:
        return x
    shape, size = x.shape, length * inner
    rest = inner * shape[dim + 1 :].numel()
    opened = x.reshape(*shape[:dim], shape[dim] // inner, rest)
    before, after = (0, units) if by > 0 else (units, 0)
    runs = _extended(opened, before, after, chunks, group, dim, 1)
    leading, tokens = shape[:dim].numel(), shape[dim] // chunks
    elements = runs.reshape(chunks, leading, -1, shape[dim + 1 :].numel())
    moved = elements.narrow(2, by if by > 0 else units * inner + by, tokens)
    moved = moved.transpose(0, 1).reshape(shape)
    first = 0 if by > 0 else length - units
    there = take_range(opened, own, first, units, length, dim)
    around = identity_grad_all_reduce(sum_partials(there, group, what), group, what)
    around = around.reshape(*shape[:dim], units * inner, *shape[dim + 1 :])
    wanted = (own[:, None] * inner + torch.arange(inner, device=own.device)).flatten() + by
    crosses = (wanted < 0) | (wanted >= size)
    index = (wanted.remainder(size) - first * inner).clamp(0, units * inner - 1)
    return choose_tokens(around.index_select(dim, index), moved, crosses, dim, 1, 1)


def _another(x: torch.Tensor, dim: int, outer: int, inner: int) -> torch.Tensor:
    """Every token replaced by its neighbour on this rank, or by half of itself where they agree.

    Padding repeats tokens, so that a rank may hold one of them twice.
    """
    x = x.detach()
    tokens = x.shape[dim] // (outer * inner)
    opened = x.reshape(*x.shape[:dim], outer, tokens, inner * x.shape[dim + 1 :].numel())
    beside = opened.roll(1, dim + 1).reshape(x.shape)
    if not (x.is_floating_point() or x.is_complex()):
        return beside
    return torch.where(beside == x, x * 0.5, beside)


def convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    stride: Sequence[int],
    pads: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """A convolution with its own zero padding before and after each dimension."""
    rank = len(stride)
    if any(left != right or left < 0 for left, right in pads):
        x = F.pad(x, [amount for pair in reversed(pads) for amount in pair])
        pads = [(0, 0)] * rank
    padding = [left for left, _ in pads]
    result: torch.Tensor = torch.ops.aten.convolution.default(
        x, weight, bias, list(stride), padding, list(dilation), False, [0] * rank, groups
    )
    return result


def fill_convolved(
    y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    valid: torch.Tensor,
    *,
    stride: Sequence[int],
    pads: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int,
    dim: int,
    outer: int,
    inner: int,
) -> torch.Tensor:
    """A convolution's result with a value where a token is padding.

    It has seen zeros there, and gives zeros where it has no bias, which a model that divides by
    their norm would make NaN. The value is what the convolution makes of this rank's first tokens.

    Parameters
    ----------
    x
        What was convolved, padding as it stands.
    dim, outer, inner
        Of the result.
    """
    seen = dilation[dim - 2] * (weight.shape[dim] - 1) + 1
    window = torch.arange(seen, device=x.device) % x.shape[dim]
    inner_pads = [(0, 0) if i == dim - 2 else pair for i, pair in enumerate(pads)]
    some = convolution(
        x.detach().index_select(dim, window), weight.detach(),
        None if bias is None else bias.detach(),
        stride=stride, pads=inner_pads, dilation=dilation, groups=groups,
    )  # fmt: skip
    return choose_tokens(y, some, valid, dim, outer, inner)


def convolve_tokens(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    stride: Sequence[int],
    pads: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int,
    lead: int,
    frames: int,
    before: int,
    after: int,
    chunks: int,
    group: str,
    dim: int,
) -> torch.Tensor:
    """A convolution over this rank's tokens, whose neighbours come from where they are.

    Parameters
    ----------
    x
        Zero where a token is padding.
    lead
        How many frames before a token's first one its first output begins to look.
    frames
        Elements of ``dim`` that one token has.
    before, after
        Neighbouring tokens that a run needs on each side.
    """
    at = dim - 2
    span = dilation[at] * (weight.shape[dim] - 1) + 1
    runs = runs_seen(
        x, 0.0, stride=stride[at], span=span, lead=lead, frames=frames, before=before,
        after=after, chunks=chunks, group=group, dim=dim,
    )  # fmt: skip
    inner_pads = [(0, 0) if i == at else pair for i, pair in enumerate(pads)]
    y = convolution(
        runs, weight, bias, stride=stride, pads=inner_pads, dilation=dilation, groups=groups
    )
    return joined_runs(y, x.shape[0], chunks, dim)


def runs_seen(
    x: torch.Tensor,
    fill: float,
    *,
    stride: int,
    span: int,
    lead: int,
    frames: int,
    before: int,
    after: int,
    chunks: int,
    group: str,
    dim: int,
) -> torch.Tensor:
    """[chunks * batch, ...]: of each run of tokens what its windows of ``span`` elements see.

    ``fill`` stands beyond the ends of the line. For the other parameters see ``convolve_tokens``.
    """
    runs = runs_between(
        x, fill, frames=frames, before=before, after=after, chunks=chunks, group=group, dim=dim
    )
    outputs = x.shape[dim] // chunks // stride
    return runs.narrow(dim, before * frames - lead, stride * (outputs - 1) + span)


def runs_between(
    x: torch.Tensor,
    fill: float,
    *,
    frames: int,
    before: int,
    after: int,
    chunks: int,
    group: str,
    dim: int,
) -> torch.Tensor:
    """[chunks * batch, ...]: each run of tokens with those next to it."""
    shape = x.shape
    rest = frames * shape[dim + 1 :].numel()
    opened = x.reshape(*shape[:dim], shape[dim] // frames, rest)
    runs = _extended(opened, before, after, chunks, group, dim, 1, fill)
    return runs.reshape(chunks * shape[0], *shape[1:dim], runs.shape[2] * frames, *shape[dim + 1 :])


def joined_runs(y: torch.Tensor, batch: int, chunks: int, dim: int) -> torch.Tensor:
    """What windows of each run gave, [chunks * batch, ...], one run after the other."""
    split = y.reshape(chunks, batch, *y.shape[1:]).movedim(0, dim)
    return split.reshape(batch, *y.shape[1:dim], chunks * y.shape[dim], *y.shape[dim + 1 :])
