"""From whole to split and back: ``shard`` takes this rank's tokens, ``gather`` joins all ranks'.

Each is the other's backward. A whole tensor is the same on every rank and so is its gradient; then
the gradient of taking a part is the parts joined, and the gradient of joining is one's own part.
"""

from __future__ import annotations

from typing import Any

import torch

from ringfx.comm.autograd_function import register_autograd
from ringfx.comm.group_argument import Group, name_and_size
from ringfx.comm.process_group import Ranks
from ringfx.errors import InvalidArgument
from ringfx.ir.layout import Layout, LayoutKind
from ringfx.validation.arguments import choice, tensor, whole_number

__all__ = ["gather", "shard"]

LAYOUTS = ("contiguous", "zigzag")

Tensor = torch.Tensor


def shard(x: Tensor, dim: int, *, layout: LayoutKind = "contiguous", group: Group = None) -> Tensor:
    """This rank's tokens of a whole tensor.

    Parameters
    ----------
    x
        The same on all ranks, any shape.
    dim
        The dim of tokens.
    layout
        ``contiguous``: rank r of p takes the r-th of p equal runs. ``zigzag``: of 2p equal runs
        rank r takes r and 2p-1-r.
    group
        A process group, a device mesh of one dim, or None for all ranks.

    Returns
    -------
    Tensor
        Contiguous; a length that does not divide is padded with zeros at the end, so that all
        shards are equal.

    >>> shard(torch.arange(4.0), 0).tolist()
    [0.0, 1.0, 2.0, 3.0]
    """
    tensor("shard", "x", x)
    choice("shard", "layout", layout, LAYOUTS)
    name, size = name_and_size(group)
    dim = _token_dim("shard", x, dim)
    found: Tensor = torch.ops.ringfx.shard(x, dim, layout, size, name)
    return found


def gather(
    x: Tensor,
    dim: int,
    *,
    layout: LayoutKind = "contiguous",
    length: int | None = None,
    group: Group = None,
) -> Tensor:
    """The whole tensor, from every rank's tokens.

    Parameters
    ----------
    x, dim, layout, group
        As ``shard`` gives and takes them.
    length
        The true number of tokens, to which padding is cropped; by default all that there are.
    """
    tensor("gather", "x", x)
    choice("gather", "layout", layout, LAYOUTS)
    name, size = name_and_size(group)
    dim = _token_dim("gather", x, dim)
    padded = x.shape[dim] * size
    length = padded if length is None else whole_number("gather", "length", length)
    expected = Layout(layout, length, size).local_length
    if expected != x.shape[dim]:
        raise InvalidArgument(
            f"gather: {x.shape[dim]} tokens on each of {size} ranks cannot be {length} in all: in "
            f"{layout} layout each rank would have {expected}. "
            "Do: pass the length that the tensor had before shard."
        )
    found: Tensor = torch.ops.ringfx.gather(x, dim, layout, length, size, name)
    return found


def _token_dim(where: str, x: Tensor, dim: int) -> int:
    dim = whole_number(where, "dim", dim, least=-x.dim())
    if not -x.dim() <= dim < x.dim():
        raise InvalidArgument(
            f"{where}: dim {dim} of a tensor of shape {tuple(x.shape)} does not exist. Do: pass "
            f"the dim of its tokens, from {-x.dim()} to {x.dim() - 1}."
        )
    return dim % x.dim()


def _layout(kind: str, length: int, size: int) -> Layout:
    if kind not in ("contiguous", "zigzag"):
        raise InvalidArgument(f"layout is {kind!r}. Do: use 'contiguous' or 'zigzag'.")
    return Layout("zigzag" if kind == "zigzag" else "contiguous", length, size)


@torch.library.custom_op("ringfx::shard", mutates_args=())
def _shard(x: Tensor, dim: int, layout: str, size: int, group: str) -> Tensor:
    ranks = Ranks.named(group, "shard")
    split = _layout(layout, x.shape[dim], size)
    local = x.new_zeros(_with_length(x, dim, split.local_length))
    for i, start in enumerate(split.chunk_starts(ranks.rank)):
        length = min(split.chunk_length, split.length - start)
        if length > 0:
            chunk = x.narrow(dim, start, length)
            local.narrow(dim, i * split.chunk_length, length).copy_(chunk)
    return local


@_shard.register_fake
def _(x: Tensor, dim: int, layout: str, size: int, group: str) -> Tensor:
    return x.new_empty(_with_length(x, dim, _layout(layout, x.shape[dim], size).local_length))


@torch.library.custom_op("ringfx::gather", mutates_args=())
def _gather(x: Tensor, dim: int, layout: str, length: int, size: int, group: str) -> Tensor:
    ranks = Ranks.named(group, "gather")
    split = _layout(layout, length, size)
    parts = ranks.all_gather("all-gather of tokens", x) if ranks.group is not None else x[None]
    whole = x.new_empty(_with_length(x, dim, length))
    for rank in range(size):
        for i, start in enumerate(split.chunk_starts(rank)):
            count = min(split.chunk_length, length - start)
            if count > 0:
                chunk = parts[rank].narrow(dim, i * split.chunk_length, count)
                whole.narrow(dim, start, count).copy_(chunk)
    return whole


@_gather.register_fake
def _(x: Tensor, dim: int, layout: str, length: int, size: int, group: str) -> Tensor:
    return x.new_empty(_with_length(x, dim, length))


def _with_length(x: Tensor, dim: int, length: int) -> list[int]:
    shape = list(x.shape)
    shape[dim] = length
    return shape


def _shard_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, dim, layout, size, group = inputs
    ctx.settings = (dim, layout, x.shape[dim], size, group)


def _shard_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    return torch.ops.ringfx.gather(gradient, *ctx.settings), None, None, None, None


def _gather_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, dim, layout, _, size, group = inputs
    ctx.settings = (dim, layout, size, group)


def _gather_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    return torch.ops.ringfx.shard(gradient, *ctx.settings), None, None, None, None, None


register_autograd(_shard, _shard_backward, setup_context=_shard_context)
register_autograd(_gather, _gather_backward, setup_context=_gather_context)
