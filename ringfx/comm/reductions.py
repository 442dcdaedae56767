"""Softmax and reductions along the tokens: each rank's part, and one number a row exchanged.

With m the largest score of a row over all ranks and s the sum of exp(x - m) over all of them,

    softmax = exp(x - m) / s,   log_softmax = x - m - log(s),   logsumexp = m + log(s)

Maxima and the like are those of the ranks' own ones, of which every rank gets all: what is reduced
by a maximum may be NaN, which a maximum over ranks may lose.

``valid`` is bool [tokens], which of a rank's tokens are no padding. The dimension ``dim`` is
[outer, tokens, inner].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch

from ringfx.comm import collective_ops
from ringfx.comm.autograd_function import Function
from ringfx.comm.conjugate import identity_grad_all_reduce, mask_tokens, sum_partials

__all__ = [
    "extreme_of_tokens", "first_extreme", "log_softmax_tokens", "logsumexp_of_tokens",
    "softmax_tokens", "truth_of_tokens",
]  # fmt: skip

Tensor = torch.Tensor


def softmax_tokens(
    x: Tensor, valid: Tensor, dtype: torch.dtype, is_safe: bool,
    group: str, dim: int, outer: int, inner: int, what: str,
) -> Tensor:  # fmt: skip
    """Softmax over dimension ``dim``; ``is_safe``: a row of -inf becomes 0 instead of NaN."""
    place = (dim, outer, inner)
    _, exponentials = _exponentials(x, valid, dtype, (dim,), is_safe, group, *place, what)
    total = sum_partials(exponentials.sum(dim, keepdim=True), group, what)
    shared = identity_grad_all_reduce(total, group, what)
    if is_safe:
        shared = shared.masked_fill(shared == 0.0, 1.0)
    # 1 is what padding may hold: a logarithm of it is finite.
    return mask_tokens((exponentials / shared).to(dtype), valid, 1.0, *place)


def log_softmax_tokens(
    x: Tensor, valid: Tensor, dtype: torch.dtype,
    group: str, dim: int, outer: int, inner: int, what: str,
) -> Tensor:  # fmt: skip
    """Log-softmax over dimension ``dim``."""
    place = (dim, outer, inner)
    top, exponentials = _exponentials(x, valid, dtype, (dim,), False, group, *place, what)
    total = sum_partials(exponentials.sum(dim, keepdim=True), group, what)
    shared = identity_grad_all_reduce(total, group, what)
    found = x.to(exponentials.dtype) - top - shared.log()
    return mask_tokens(found.to(dtype), valid, 0.0, *place)


def logsumexp_of_tokens(
    x: Tensor, valid: Tensor, dtype: torch.dtype, dims: Sequence[int], keepdim: bool,
    group: str, dim: int, outer: int, inner: int, what: str,
) -> Tensor:  # fmt: skip
    """Logsumexp over dimensions of which ``dim`` is one; the same on every rank."""
    dims = tuple(dims)
    place = (dim, outer, inner)
    top, exponentials = _exponentials(x, valid, dtype, dims, True, group, *place, what)
    found = top + sum_partials(exponentials.sum(dims, keepdim=True), group, what).log()
    return (found if keepdim else _squeezed(found, dims)).to(dtype)


def _exponentials(
    x: Tensor, valid: Tensor, dtype: torch.dtype, dims: tuple[int, ...], is_safe: bool,
    group: str, dim: int, outer: int, inner: int, what: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The largest of all ranks, and exp(x - it), 0 where a token is padding."""
    narrow = dtype in (torch.float16, torch.bfloat16)
    shown = mask_tokens(
        x.to(torch.float32 if narrow else dtype), valid, -math.inf, dim, outer, inner
    )
    top = collective_ops.largest(shown.detach().amax(dims, keepdim=True), group, what)
    if is_safe:
        top = top.masked_fill(top.isinf(), 0.0)
    return top, (shown - top).exp()


def truth_of_tokens(
    x: Tensor, valid: Tensor, kind: str, dims: Sequence[int], keepdim: bool,
    ranks: int, group: str, dim: int, outer: int, inner: int, what: str,
) -> Tensor:  # fmt: skip
    """``any`` or ``all`` over dimensions of which ``dim`` is one; the same on every rank."""
    reduce = torch.any if kind == "any" else torch.all
    shown = mask_tokens(x != 0, valid, kind == "all", dim, outer, inner)
    mine = reduce(shown, tuple(dims), keepdim=keepdim)  # type: ignore[call-overload]
    return reduce(collective_ops.all_gather(mine, ranks, group, what), 0)


class _Extreme(Function):
    """amax or amin; equal elements share the gradient, wherever they are."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shown: Tensor, valid: Tensor, kind: str, dims: tuple[int, ...],
        ranks: int, group: str, what: str, *place: int,
    ) -> Tensor:  # fmt: skip
        reduce = torch.amax if kind == "amax" else torch.amin
        mine = reduce(shown, dims, keepdim=True)
        found = reduce(collective_ops.all_gather(mine, ranks, group, what), 0)
        ctx.save_for_backward(shown, valid, found)
        ctx.settings = (dims, group, f"the gradient of {what}", place)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        shown, valid, found = ctx.saved_tensors
        dims, group, what, place = ctx.settings
        equal = mask_tokens(shown == found, valid, False, *place).to(grads[0].dtype)
        count = collective_ops.all_reduce(equal.sum(dims, keepdim=True), group, what)
        return equal * (grads[0] / count), *[None] * 10


def extreme_of_tokens(
    x: Tensor, valid: Tensor, kind: str, dims: Sequence[int], keepdim: bool,
    ranks: int, group: str, dim: int, outer: int, inner: int, what: str,
) -> Tensor:  # fmt: skip
    """``amax`` or ``amin`` over dimensions of which ``dim`` is one; the same on every rank."""
    dims = tuple(dims)
    shown = mask_tokens(x.detach(), valid, _worst(x.dtype, kind), dim, outer, inner)
    where = (ranks, group, what, dim, outer, inner)
    found = _Extreme.apply(x, shown, valid, kind, dims, *where)  # type: ignore[no-untyped-call]
    return cast(Tensor, found if keepdim else _squeezed(found, dims))


def first_extreme(
    x: Tensor, own: Tensor, length: int, kind: str, keepdim: bool,
    ranks: int, group: str, dim: int, inner: int, what: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The largest (``amax``) or smallest element over ``dim`` and the place of the first such one.

    Parameters
    ----------
    own
        int64 [local tokens]: which token of the axis each local token is; padding is outside
        0 .. length - 1.
    """
    numbers = (own[:, None] * inner + torch.arange(inner, device=own.device)).flatten()
    here = numbers.view(-1, *(1,) * (x.dim() - dim - 1))
    valid = (own >= 0) & (own < length)
    shown = mask_tokens(x.detach(), valid, _worst(x.dtype, kind), dim, 1, inner)
    reduce = torch.amax if kind == "amax" else torch.amin
    best = reduce(
        collective_ops.all_gather(reduce(shown, dim, keepdim=True), ranks, group, what), 0
    )
    last, is_token = length * inner, (here >= 0) & (here < length * inner)
    is_best = ((shown == best) | (shown.isnan() & best.isnan())) & is_token
    mine = torch.where(is_best, here, last).amin(dim, keepdim=True)
    place = collective_ops.all_gather(mine, ranks, group, what).amin(0)
    picked = torch.where(is_token & (here == place), x, torch.zeros_like(x)).sum(dim, keepdim=True)
    value = sum_partials(picked.to(x.dtype), group, what)
    return (value, place) if keepdim else (value.squeeze(dim), place.squeeze(dim))


def _worst(dtype: torch.dtype, kind: str) -> float | int:
    """What no element is beyond."""
    if dtype.is_floating_point:
        return -math.inf if kind == "amax" else math.inf
    info = torch.iinfo(dtype)
    return info.min if kind == "amax" else info.max


def _squeezed(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return x.squeeze(dims)
