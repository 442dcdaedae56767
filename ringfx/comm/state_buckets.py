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

from ringfx.comm import collective_ops, state_messages
from ringfx.comm.autograd_function import Function
from ringfx.comm.state_ranks import StateRanks

__all__ = ["gather_state", "gather_states", "rows_of_a_part"]


def rows_of_a_part(rows: int, ranks: int) -> int:
    """Rows of the first dimension that each rank holds, padding included."""
    return -(-rows // ranks)


class _GatherReduceScatter(Function):
    @staticmethod
    def forward(ctx: Any, rows: Sequence[int], states: StateRanks, what: str, *parts: Any) -> Any:
        ctx.set_materialize_grads(False)
        ctx.where, ctx.shapes, ctx.dtype = (states, what), [p.shape for p in parts], parts[0].dtype
        return tuple(_gathered(rows, states, what, parts))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        states, what = ctx.where
        given = next((g for g in grads if g is not None), None)
        if given is None:
            return None, None, None, *[None] * len(grads)
        padded = [
            given.new_zeros(states.ranks, shape.numel())
            if g is None
            else _in_parts(g, shape, states.ranks)
            for g, shape in zip(grads, ctx.shapes, strict=True)
        ]
        mine = _summed(torch.cat(padded, 1), states, what)
        if states.replicas > 1:
            mine = mine / states.replicas
        sizes = [shape.numel() for shape in ctx.shapes]
        pieces = zip(mine.to(ctx.dtype).split(sizes), ctx.shapes, grads, strict=True)
        return None, None, None, *(None if g is None else x.view(s).clone() for x, s, g in pieces)


class _GatherSlice(Function):
    """The gradients of all ranks of a sequence are equal: each takes its rows."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, rows: int, states: StateRanks, what: str) -> Any:
        ctx.where, ctx.shape, ctx.dtype = (states, what), part.shape, part.dtype
        return _gathered([rows], states, what, [part])[0]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        states, what = ctx.where
        parts = _in_parts(grads[0], ctx.shape, states.ranks)
        if states.replicas > 1:  # equal within a sequence, so that the mean is over replicas
            mine = _summed(parts, states, what) / states.ranks
        else:
            mine = collective_ops.take_part(parts, states.group)
        return mine.to(ctx.dtype).view(ctx.shape), None, None, None


def _gathered(
    rows: Sequence[int], states: StateRanks, what: str, parts: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    flat = torch.cat([part.reshape(-1) for part in parts]).to(states.param_dtype or parts[0].dtype)
    begun = state_messages.begin_gather(flat, states.ranks, states.group, what)
    pieces = state_messages.finish_gather(begun, [part.numel() for part in parts], [])
    return [
        piece.view(states.ranks * part.shape[0], *part.shape[1:])[:number]
        for piece, part, number in zip(pieces, parts, rows, strict=True)
    ]


def _summed(parts: torch.Tensor, states: StateRanks, what: str) -> torch.Tensor:
    """This rank's part of the sum over all ranks, in the type that gradients are summed in."""
    sent = parts.to(states.reduce_dtype or parts.dtype)
    begun = state_messages.begin_scatter(sent, states.group, what)
    total: torch.Tensor = state_messages.finish_scatter(begun, sent, [])
    return total


def _in_parts(grad: torch.Tensor, shape: torch.Size, ranks: int) -> torch.Tensor:
    """[ranks, elements of a part] of a gradient of all rows; padding is 0."""
    missing = ranks * shape[0] - grad.shape[0]
    if missing:
        grad = torch.cat([grad, grad.new_zeros(missing, *grad.shape[1:])])
    return grad.reshape(ranks, -1)


def gather_states(
    parts: Sequence[torch.Tensor], rows: Sequence[int], states: tuple[Any, ...], what: str
) -> tuple[torch.Tensor, ...]:
    """Whole parameters of a bucket, for computations that each rank does for its own tokens.

    Parameters
    ----------
    parts
        [rows of a part, ...] of each parameter, of one type.
    rows
        Of each whole parameter.
    states
        ``StateRanks.as_argument()``.
    """
    ranks = StateRanks.of_argument(states)
    found: tuple[torch.Tensor, ...] = _GatherReduceScatter.apply(list(rows), ranks, what, *parts)  # type: ignore[no-untyped-call]
    return found


def gather_state(part: torch.Tensor, rows: int, states: tuple[Any, ...], what: str) -> torch.Tensor:
    """A whole parameter, for computations that every rank of a sequence repeats."""
    ranks = StateRanks.of_argument(states)
    found: torch.Tensor = _GatherSlice.apply(part, rows, ranks, what)  # type: ignore[no-untyped-call]
    return found
