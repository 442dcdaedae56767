"""Conjugate communication: every transfer between whole and split, with its transpose as backward.

| forward                     | backward                     | name           |
|-----------------------------|------------------------------|----------------|
| take this rank's tokens     | all-gather                   | slice_tokens   |
| all-gather                  | take this rank's tokens      | gather_tokens  |
| all-gather                  | reduce-scatter               | gather_shared  |
| all-reduce of partial sums  | identity                     | sum_partials   |
| identity                    | all-reduce                   | share          |

With these alone, gradients of a split program are right by construction. All are plain functions
of tensors and Python numbers, so that they can stand in an fx graph; the rank enters only through
the index tensors. Shapes are written [outer, tokens, inner], flattened into one dimension ``dim``.
"""

from __future__ import annotations

from typing import Any, cast

import torch

__all__ = [
    "gather_plain",
    "gather_shared",
    "gather_tokens",
    "mask_tokens",
    "pick_token",
    "share",
    "slice_tokens",
    "sum_partials",
    "take_plain",
]

_c10d = torch.ops._c10d_functional


def _wait(x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = _c10d.wait_tensor(x)
    return result


def _all_reduce(x: torch.Tensor, group: str) -> torch.Tensor:
    return _wait(_c10d.all_reduce(x.contiguous(), "sum", group))


def _take(x: torch.Tensor, index: torch.Tensor, dim: int, outer: int, inner: int) -> torch.Tensor:
    """Tokens at ``index`` of a dimension that is [outer, tokens, inner]."""
    if outer == 1 and inner == 1:
        return x.index_select(dim, index)
    shape = x.shape
    tokens = shape[dim] // (outer * inner)
    opened = x.reshape(*shape[:dim], outer, tokens, inner, *shape[dim + 1 :])
    taken = opened.index_select(dim + 1, index)
    return taken.reshape(*shape[:dim], outer * index.shape[0] * inner, *shape[dim + 1 :])


def mask_tokens(
    x: torch.Tensor, valid: torch.Tensor, fill: float, dim: int, outer: int, inner: int
) -> torch.Tensor:
    """x with ``fill`` where a token is padding; ``valid`` is bool [tokens]."""
    tokens = valid.shape[0]
    row = valid.view(1, tokens, 1).expand(outer, tokens, inner).reshape(outer * tokens * inner)
    row = row.view(-1, *(1,) * (x.dim() - dim - 1))
    return torch.where(row, x, torch.full((), fill, dtype=x.dtype, device=x.device))


def gather_plain(
    x: torch.Tensor, order: torch.Tensor, ranks: int, group: str, dim: int, outer: int, inner: int
) -> torch.Tensor:
    """All tokens by position; ``order`` picks them from the concatenation of all ranks'."""
    shape = x.shape
    tokens = shape[dim] // (outer * inner)
    before = 1
    for size in shape[:dim]:
        before *= size
    tokens_first = x.reshape(before * outer, tokens, -1).transpose(0, 1).contiguous()
    gathered = _wait(_c10d.all_gather_into_tensor(tokens_first, ranks, group))
    whole = gathered.index_select(0, order).transpose(0, 1)
    whole = whole.reshape(*shape[:dim], outer * order.shape[0] * inner, *shape[dim + 1 :])
    # Strides are those of the unsplit program: random draws follow them.
    return whole.contiguous()


def pick_token(
    x: torch.Tensor, own: torch.Tensor, element: int, dim: int, outer: int, inner: int
) -> torch.Tensor:
    """The row of one token where this rank has it, zeros elsewhere; ``dim`` is removed.

    ``own`` is int64 [local tokens]: the element that each local token is.
    """
    assert outer == inner == 1, "a token that is picked stands alone in its dimension"
    here = own == element
    row = x.index_select(dim, here.to(torch.int8).argmax(0, keepdim=True)).squeeze(dim)
    return torch.where(here.any(), row, torch.zeros((), dtype=x.dtype, device=x.device))


def take_plain(
    x: torch.Tensor, index: torch.Tensor, valid: torch.Tensor, dim: int, outer: int, inner: int
) -> torch.Tensor:
    """This rank's tokens of a whole value, zero where a token is padding."""
    return mask_tokens(_take(x, index, dim, outer, inner), valid, 0, dim, outer, inner)


class _Slice(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, index: torch.Tensor, order: torch.Tensor, *where: Any
    ) -> torch.Tensor:
        _ranks, _group, dim, outer, inner = where
        ctx.save_for_backward(order)
        ctx.where = where
        return _take(x, index, dim, outer, inner)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (order,) = ctx.saved_tensors
        whole = gather_plain(grads[0], order, *ctx.where)
        return whole, None, None, None, None, None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        index: torch.Tensor,
        order: torch.Tensor,
        valid: torch.Tensor,
        *where: Any,
    ) -> torch.Tensor:
        ctx.save_for_backward(index, valid)
        ctx.where = where
        return gather_plain(x, order, *where)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        index, valid = ctx.saved_tensors
        _, _, dim, outer, inner = ctx.where
        mine = take_plain(grads[0], index, valid, dim, outer, inner)
        return mine, None, None, None, None, None, None, None, None


class _GatherShared(_Gather):
    """The same forward; the gradients of all ranks are parts of a sum."""

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        # A reduce-scatter would move p times less; the sum first keeps one index for all layouts.
        index, valid = ctx.saved_tensors
        _, group, dim, outer, inner = ctx.where
        total = _all_reduce(grads[0], group)
        mine = take_plain(total, index, valid, dim, outer, inner)
        return mine, None, None, None, None, None, None, None, None


class _SumPartials(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: str) -> torch.Tensor:
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0], None


class _Share(torch.autograd.Function):
    """Identity forward; backward sums every gradient over the ranks in one message."""

    @staticmethod
    def forward(ctx: Any, group: str, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.group = group
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        if len(grads) == 1:
            return None, _all_reduce(grads[0], ctx.group)
        flat = torch.cat([g.reshape(-1) for g in grads])
        parts = _all_reduce(flat, ctx.group).split([g.numel() for g in grads])
        return None, *(p.view(g.shape) for p, g in zip(parts, grads, strict=True))


def _apply(function: type[torch.autograd.Function], *args: Any) -> torch.Tensor:
    return cast(torch.Tensor, function.apply(*args))  # type: ignore[no-untyped-call]


def slice_tokens(
    x: torch.Tensor, index: torch.Tensor, order: torch.Tensor,
    ranks: int, group: str, dim: int, outer: int, inner: int,
) -> torch.Tensor:  # fmt: skip
    """This rank's tokens of a whole value; backward all-gathers."""
    if not x.requires_grad:
        return _take(x, index, dim, outer, inner)
    return _apply(_Slice, x, index, order, ranks, group, dim, outer, inner)


def gather_tokens(
    x: torch.Tensor, index: torch.Tensor, order: torch.Tensor, valid: torch.Tensor,
    ranks: int, group: str, dim: int, outer: int, inner: int,
) -> torch.Tensor:  # fmt: skip
    """The whole of a split value for computations that every rank repeats."""
    return _apply(_Gather, x, index, order, valid, ranks, group, dim, outer, inner)


def gather_shared(
    x: torch.Tensor, index: torch.Tensor, order: torch.Tensor, valid: torch.Tensor,
    ranks: int, group: str, dim: int, outer: int, inner: int,
) -> torch.Tensor:  # fmt: skip
    """The whole of a split value for computations that each rank does for its own tokens."""
    return _apply(_GatherShared, x, index, order, valid, ranks, group, dim, outer, inner)


def sum_partials(x: torch.Tensor, group: str) -> torch.Tensor:
    """The sum over ranks of a partial sum, on every rank."""
    return _apply(_SumPartials, x, group)


def share(tensors: list[torch.Tensor], group: str) -> tuple[torch.Tensor, ...]:
    """Whole values that each rank uses for its own tokens: gradients are summed over ranks."""
    shared = _Share.apply(group, *tensors)  # type: ignore[no-untyped-call]
    return cast(tuple[torch.Tensor, ...], shared)
