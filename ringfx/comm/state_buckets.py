"""Parameters of which each rank holds its rows: gathered just before use, in buckets.

A parameter's first dimension is cut into as many parts as there are ranks, of ceil(rows / ranks)
rows each, as DTensor's ``Shard(0)`` cuts it; parts that are shorter, or empty, are padded. A bucket
is gathered in one message. Its gradient, of which each rank has a part, is summed and cut in one
message as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ringfx.comm import collective_ops
from ringfx.comm.autograd_function import Function

__all__ = ["gather_state", "gather_states", "rows_of_a_part"]


def rows_of_a_part(rows: int, ranks: int) -> int:
    """Rows of the first dimension that each rank holds, padding included."""
    return -(-rows // ranks)


class _GatherReduceScatter(Function):
    @staticmethod
    def forward(ctx: Any, rows: Sequence[int], where: tuple[Any, ...], *parts: Any) -> Any:
        ctx.set_materialize_grads(False)
        ctx.where, ctx.shapes = where, [part.shape for part in parts]
        return tuple(_gathered(rows, where, parts))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        ranks, group, what = ctx.where
        given = next((g for g in grads if g is not None), None)
        if given is None:
            return None, None, *[None] * len(grads)
        padded = [
            given.new_zeros(ranks, shape.numel()) if g is None else _in_parts(g, shape, ranks)
            for g, shape in zip(grads, ctx.shapes, strict=True)
        ]
        mine = collective_ops.reduce_scatter(torch.cat(padded, 1), group, what)
        sizes = [shape.numel() for shape in ctx.shapes]
        pieces = zip(mine.split(sizes), ctx.shapes, grads, strict=True)
        return None, None, *(None if g is None else x.view(s).clone() for x, s, g in pieces)


class _GatherSlice(Function):
    """The gradients of all ranks are equal: each takes its rows."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, rows: int, where: tuple[Any, ...]) -> Any:
        ctx.where, ctx.shape = where, part.shape
        return _gathered([rows], where, [part])[0]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        ranks, group, _ = ctx.where
        parts = _in_parts(grads[0], ctx.shape, ranks)
        return collective_ops.take_part(parts, group).view(ctx.shape), None, None


def _gathered(
    rows: Sequence[int], where: tuple[Any, ...], parts: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    ranks, group, what = where
    flat = torch.cat([part.reshape(-1) for part in parts])
    everyone = collective_ops.all_gather(flat, ranks, group, what)
    pieces = everyone.split([part.numel() for part in parts], 1)
    return [
        piece.reshape(ranks * part.shape[0], *part.shape[1:])[:number].clone()
        for piece, part, number in zip(pieces, parts, rows, strict=True)
    ]


def _in_parts(grad: torch.Tensor, shape: torch.Size, ranks: int) -> torch.Tensor:
    """[ranks, elements of a part] of a gradient of all rows; padding is 0."""
    missing = ranks * shape[0] - grad.shape[0]
    if missing:
        grad = torch.cat([grad, grad.new_zeros(missing, *grad.shape[1:])])
    return grad.reshape(ranks, -1)


def gather_states(
    parts: Sequence[torch.Tensor], rows: Sequence[int], ranks: int, group: str, what: str
) -> tuple[torch.Tensor, ...]:
    """Whole parameters of a bucket, for computations that each rank does for its own tokens.

    Parameters
    ----------
    parts
        [rows of a part, ...] of each parameter.
    rows
        Of each whole parameter.
    """
    where = (ranks, group, what)
    found: tuple[torch.Tensor, ...] = _GatherReduceScatter.apply(list(rows), where, *parts)  # type: ignore[no-untyped-call]
    return found


def gather_state(part: torch.Tensor, rows: int, ranks: int, group: str, what: str) -> torch.Tensor:
    """A whole parameter, for computations that every rank repeats."""
    found: torch.Tensor = _GatherSlice.apply(part, rows, (ranks, group, what))  # type: ignore[no-untyped-call]
    return found
