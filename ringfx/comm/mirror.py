"""Tokens in the reverse order: each run goes to the rank that has the run at the other end.

Under the zigzag layout that is the same rank. The transpose is the same exchange.
"""

from __future__ import annotations

from typing import Any

import torch

from ringfx.comm.autograd_function import register_autograd
from ringfx.comm.halo import shift_tokens
from ringfx.comm.process_group import Ranks

__all__ = ["flip_tokens"]

Tensor = torch.Tensor


@torch.library.custom_op("ringfx::mirror", mutates_args=())
def _mirror(x: Tensor, group: str, what: str) -> Tensor:
    """The tensor of the rank that is as far from the last rank as this one is from the first."""
    ranks = Ranks.named(group, "outside attention")
    other = ranks.size - 1 - ranks.rank
    x = x.contiguous()
    if other == ranks.rank:
        return x.clone()
    received = torch.empty_like(x)
    return ranks.exchange(
        f"flip of {what}", send=x, to=other, receive=received, source=other
    ).wait()


@_mirror.register_fake
def _(x: Tensor, group: str, what: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *ctx.settings = inputs


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _mirror(grad, *ctx.settings), None, None


register_autograd(_mirror, _backward, setup_context=_setup_context)


def flip_tokens(
    x: Tensor, dims: list[int], by: int, valid: Tensor,
    chunks: int, group: str, dim: int, inner: int, what: str,
) -> Tensor:  # fmt: skip
    """x with the order of ``dims`` reversed, of which ``dim`` holds tokens.

    Parameters
    ----------
    by
        How many tokens the reversed line moves, so that its padding is at the end again.
    valid
        bool [local tokens]: which are no padding.
    """
    turned = x.flip(dims)
    if chunks == 1:
        turned = _mirror(turned, group, what)
    if not by:
        return turned
    return shift_tokens(turned, by, valid, chunks, group, dim, 1, inner)
