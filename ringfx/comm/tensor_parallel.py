"""Conversions over the ranks of tensor parallelism, each with its transpose as backward.

| name            | forward                                 | backward    |
|-----------------|-----------------------------------------|-------------|
| gather_parts    | all-gather along a dimension            | own part    |
| own_part        | this rank's part of a dimension         | all-gather  |
| sum_to_part     | reduce-scatter along a dimension        | all-gather  |
| on_first_rank   | the value on rank 0, zeros on others    | identity    |
| own_rows        | row numbers as this rank counts its own | none        |

``ringfx.comm.conjugate`` has the other two: ``identity_grad_all_reduce`` (replicated, used for a
part) and ``sum_partials`` (partial to replicated). Parts are equal and lie in the ranks' order, as
DTensor's ``Shard(dim)`` cuts what divides. The rank enters through ``take_part`` alone, so that all
ranks run one program.
"""

from __future__ import annotations

from typing import Any, cast

import torch

from ringfx.comm import collective_ops
from ringfx.comm.autograd_function import Function

__all__ = ["gather_parts", "on_first_rank", "own_part", "own_rows", "sum_to_part"]

Tensor = torch.Tensor


def _parts_first(x: Tensor, ranks: int, dim: int) -> Tensor:
    """[ranks, ...] of a dimension that is [ranks, part], contiguous."""
    parts: Tensor = x.unflatten(dim, (ranks, -1))
    return parts.movedim(dim, 0).contiguous()


def _gathered(x: Tensor, ranks: int, group: str, dim: int, what: str) -> Tensor:
    whole: Tensor = collective_ops.all_gather(x, ranks, group, what)
    return whole.movedim(0, dim).flatten(dim, dim + 1)


def _own(x: Tensor, ranks: int, group: str, dim: int) -> Tensor:
    mine: Tensor = collective_ops.take_part(_parts_first(x, ranks, dim), group)
    return mine


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: int, group: str, dim: int, what: str) -> Tensor:
        ctx.where = (ranks, group, dim)
        return _gathered(x, ranks, group, dim, what)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _own(grads[0], *ctx.where), None, None, None, None


class _OwnPart(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: int, group: str, dim: int, what: str) -> Tensor:
        ctx.where = (ranks, group, dim, f"the gradient of {what}")
        return _own(x, ranks, group, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _gathered(grads[0], *ctx.where), None, None, None, None


class _SumToPart(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: int, group: str, dim: int, what: str) -> Tensor:
        ctx.where = (ranks, group, dim, f"the gradient of {what}")
        mine: Tensor = collective_ops.reduce_scatter(_parts_first(x, ranks, dim), group, what)
        return mine

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _gathered(grads[0], *ctx.where), None, None, None, None


class _OnFirst(Function):
    """A part of a sum has the gradient of the sum, on every rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: int, group: str) -> Tensor:
        is_first = torch.arange(ranks, device=x.device) == 0
        here = collective_ops.take_part(is_first, group)
        return torch.where(here, x, x.new_zeros(()))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None, None


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    return cast(Tensor, function.apply(*args))  # type: ignore[no-untyped-call]


def gather_parts(x: Tensor, ranks: int, group: str, dim: int, what: str) -> Tensor:
    """Sharded along ``dim`` to replicated."""
    return _apply(_Gather, x, ranks, group, dim, what)


def own_part(x: Tensor, ranks: int, group: str, dim: int, what: str) -> Tensor:
    """Replicated to sharded along ``dim``."""
    return _apply(_OwnPart, x, ranks, group, dim, what)


def sum_to_part(x: Tensor, ranks: int, group: str, dim: int, what: str) -> Tensor:
    """Partial to sharded along ``dim``."""
    return _apply(_SumToPart, x, ranks, group, dim, what)


def on_first_rank(x: Tensor, ranks: int, group: str) -> Tensor:
    """Replicated to partial: what is added once to a sum over the ranks."""
    return _apply(_OnFirst, x, ranks, group)


def own_rows(numbers: Tensor, rows: int, ranks: int, group: str) -> Tensor:
    """Rows of a whole table as this rank, which has ``rows`` of them, counts them; else -1."""
    starts = torch.arange(ranks, dtype=numbers.dtype, device=numbers.device) * rows
    mine: Tensor = numbers - collective_ops.take_part(starts, group)
    return torch.where((mine >= 0) & (mine < rows), mine, -1)
