"""Tokens traded for another dimension: what a call that needs all tokens of a few channels runs on.

A Fourier transform or a sort along the tokens treats each channel alone. So each rank sends every
other one its tokens of that rank's channels, runs the call on whole rows of fewer channels, and the
way back is the same. ``turn`` marks where the program does that; ``turn_tokens`` is what a rank
runs. The transpose of one way is the other.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from ringfx.comm.autograd_function import register_autograd
from ringfx.comm.process_group import Ranks
from ringfx.comm.redistribute import Spread

__all__ = ["apart", "turn", "turn_tokens"]

Tensor = torch.Tensor


def turn(x: Tensor, dim: int, other: int) -> Tensor:
    """The value itself: its tokens are ``dim`` until here, and from here on ``other``."""
    same: Tensor = torch.ops.aten.alias.default(x)
    return same


def apart(x: Tensor) -> Tensor:
    """The value itself, of which no dimension is one of what it was made of."""
    same: Tensor = torch.ops.aten.alias.default(x)
    return same


@functools.lru_cache(maxsize=64)
def _held(spread: Spread) -> tuple[Tensor, Tensor]:
    """int64 [ranks * local]: the element in each place of all ranks, one after the other; -1 where
    there is none; and int64 [elements]: where each element is."""
    held = torch.cat([spread.elements(rank) for rank in range(spread.ranks)])
    places = (held >= 0).nonzero().flatten()
    where = torch.empty_like(places).scatter(0, held[places], places)
    return held, where


@torch.library.custom_op("ringfx::turn_tokens", mutates_args=())
def _turn(
    x: Tensor, here: Sequence[int], there: Sequence[int], dim: int, other: int, zeros: bool,
    group: str, what: str,
) -> Tensor:  # fmt: skip
    """All of dimension ``dim``, which was split as ``here``, and this rank's part of ``other``.

    ``zeros``: where that part is padding, it is zero; else it is some element.
    """
    ranks, before, after = Ranks.named(group, "exchange"), Spread.of(here), Spread.of(there)
    if not x.numel():  # on every rank: there is nothing to send
        return x.new_empty(_turned(x, before, after, dim, other))
    held, _ = _held(after)
    parts = x.index_select(other, held.clamp_min(0).to(x.device)).movedim(other, 0)
    parts = parts.unflatten(0, (ranks.size, after.local)).movedim(1, 1 + other).contiguous()
    raw = parts.view(ranks.size, -1).view(torch.uint8)  # so that any type travels
    received = ranks.all_to_all(f"turn of {what}", raw).view(x.dtype).view(parts.shape)
    _, where = _held(before)
    rows = received.movedim(0, dim).flatten(dim, dim + 1)
    result = rows.index_select(dim, where.to(x.device))
    if zeros:
        there_is = (after.elements(ranks.rank) >= 0).to(x.device)
        row = there_is.view(-1, *(1,) * (x.dim() - other - 1))
        result = torch.where(row, result, result.new_zeros(()))
    return result


@_turn.register_fake
def _(
    x: Tensor, here: Sequence[int], there: Sequence[int], dim: int, other: int, zeros: bool,
    group: str, what: str,
) -> Tensor:  # fmt: skip
    return x.new_empty(_turned(x, Spread.of(here), Spread.of(there), dim, other))


def _turned(x: Tensor, before: Spread, after: Spread, dim: int, other: int) -> list[int]:
    shape = list(x.shape)
    shape[dim] = before.outer * before.length * before.inner
    shape[other] = after.local
    return shape


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.here, ctx.there, ctx.dim, ctx.other, _, ctx.group, ctx.what = inputs


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    what = f"the gradient of {ctx.what}"
    back = _turn(grad, ctx.there, ctx.here, ctx.other, ctx.dim, True, ctx.group, what)
    return back, None, None, None, None, None, None, None


register_autograd(_turn, _backward, setup_context=_setup_context)


def turn_tokens(
    x: Tensor, here: Sequence[int], there: Sequence[int], dim: int, other: int, group: str,
    what: str,
) -> Tensor:  # fmt: skip
    """Split along ``other`` instead of ``dim``.

    Parameters
    ----------
    here, there
        ``Spread.numbers`` of ``dim`` as it was split, and of ``other`` as it will be. Padding there
        takes a token, so that it is no unlikelier than others.
    """
    turned: Tensor = _turn(x, list(here), list(there), dim, other, False, group, what)
    return turned
