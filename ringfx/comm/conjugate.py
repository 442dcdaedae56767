"""Conjugate communication: conversions between placements, with their transpose as backward.

| name                           | forward           | backward           |
|--------------------------------|-------------------|--------------------|
| slice_tokens                   | slice             | all-gather         |
| all_gather_grad_slice          | all-gather        | slice              |
| all_gather_grad_reduce_scatter | all-gather        | reduce-scatter     |
| identity_grad_all_reduce       | identity          | all-reduce         |
| grad_bucket_wait, _start       | identity          | all-reduce in two  |
| sum_partials                   | all-reduce        | identity           |

With these alone, gradients of a split program are right by construction (docs/glossary.md defines
the placements). All are plain functions of tensors, Python numbers and a text ``what`` that errors
name, so that they can stand in an fx graph; the rank enters only through the index tensors. Shapes
are written [outer, tokens, inner], flattened into one dimension ``dim``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch

from ringfx.comm import collective_ops
from ringfx.comm.autograd_function import Function
from ringfx.comm.grad_accumulation import NOT_REACHED

__all__ = [
    "all_gather_grad_reduce_scatter",
    "all_gather_grad_slice",
    "all_gather_tokens",
    "choose_tokens",
    "fill_padding",
    "grad_bucket_start",
    "grad_bucket_wait",
    "identity_grad_all_reduce",
    "mask_tokens",
    "repeat_token",
    "slice_tokens",
    "sum_partials",
    "take_own_tokens",
    "take_tokens",
]


def take_tokens(
    x: torch.Tensor, index: torch.Tensor, dim: int, outer: int, inner: int
) -> torch.Tensor:
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
    other = torch.full((), fill, dtype=x.dtype, device=x.device)
    return choose_tokens(x, other, valid, dim, outer, inner)


def choose_tokens(
    x: torch.Tensor, other: torch.Tensor, valid: torch.Tensor, dim: int, outer: int, inner: int
) -> torch.Tensor:
    """x where a token is valid, elsewhere what broadcasts to it; ``valid`` is bool [tokens]."""
    tokens = valid.shape[0]
    row = valid.view(1, tokens, 1).expand(outer, tokens, inner).reshape(outer * tokens * inner)
    row = row.view(-1, *(1,) * (x.dim() - dim - 1))
    return torch.where(row, x, other)


def repeat_token(
    x: torch.Tensor, valid: torch.Tensor, dim: int, outer: int, inner: int
) -> torch.Tensor:
    """x with this rank's first token where one is padding; ``valid`` is bool [tokens].

    Padding has no gradient; but where an operator's derivative is infinite, its product with that
    0 is NaN, and so is the gradient of every weight before.
    """
    shape, tokens = x.shape, valid.shape[0]
    opened = x.reshape(*shape[:dim], outer, tokens, inner, *shape[dim + 1 :])
    first = valid.to(torch.int8).argmax(0, keepdim=True)
    row = opened.detach().index_select(dim + 1, first)
    here = valid.view(tokens, *(1,) * (len(shape) - dim))
    return torch.where(here, opened, row).reshape(shape)


def fill_padding(
    out_BHQE: torch.Tensor, v_BGKE: torch.Tensor, valid_Q: torch.Tensor
) -> torch.Tensor:
    """An attention's result with a value where a query is padding.

    No key is shown to padding, which leaves it 0; and what a model does next (divide by a norm,
    take a logarithm) may give NaN there, whose product with a gradient of 0 is NaN in every weight.
    A row of v is what attention with all weight on one key gives.
    """
    some_BGE = v_BGKE.detach()[:, :, 0]
    some_BHE = some_BGE.repeat_interleave(out_BHQE.shape[1] // v_BGKE.shape[1], 1)
    return torch.where(valid_Q[:, None], out_BHQE, some_BHE[:, :, None].to(out_BHQE.dtype))


def _tokens_first(x: torch.Tensor, dim: int, outer: int, inner: int) -> torch.Tensor:
    """[tokens, everything before, everything after], contiguous."""
    tokens = x.shape[dim] // (outer * inner)
    before = outer * x.shape[:dim].numel()
    after = inner * x.shape[dim + 1 :].numel()
    return x.reshape(before, tokens, after).transpose(0, 1).contiguous()


def _tokens_back(
    x: torch.Tensor, shape: Sequence[int], dim: int, outer: int, inner: int
) -> torch.Tensor:
    """The inverse; ``shape`` is that of any tensor with other tokens."""
    back = x.transpose(0, 1)
    return back.reshape(*shape[:dim], outer * x.shape[0] * inner, *shape[dim + 1 :])


def all_gather_tokens(
    x: torch.Tensor, order: torch.Tensor,
    ranks: int, group: str, dim: int, outer: int, inner: int, what: str,
) -> torch.Tensor:  # fmt: skip
    """All tokens by position; ``order`` picks them from the concatenation of all ranks'."""
    gathered = collective_ops.all_gather(_tokens_first(x, dim, outer, inner), ranks, group, what)
    whole = gathered.flatten(0, 1).index_select(0, order)
    # Strides are those of the unsplit program: random draws follow them.
    return _tokens_back(whole, x.shape, dim, outer, inner).contiguous()


def scatter_sum(
    x: torch.Tensor, order: torch.Tensor, tokens: int,
    ranks: int, group: str, dim: int, outer: int, inner: int, what: str,
) -> torch.Tensor:  # fmt: skip
    """This rank's ``tokens`` of the sum over ranks of a whole value; zero where one is padding."""
    given = _tokens_first(x, dim, outer, inner)
    slots = given.new_zeros(ranks * tokens, *given.shape[1:]).index_copy(0, order, given)
    mine = collective_ops.reduce_scatter(slots.unflatten(0, (ranks, tokens)), group, what)
    return _tokens_back(mine, x.shape, dim, outer, inner)


def take_own_tokens(
    x: torch.Tensor, index: torch.Tensor, valid: torch.Tensor, dim: int, outer: int, inner: int
) -> torch.Tensor:
    """This rank's tokens of a replicated value, zero where a token is padding."""
    return mask_tokens(take_tokens(x, index, dim, outer, inner), valid, 0, dim, outer, inner)


class _Slice(Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, index: torch.Tensor, order: torch.Tensor, *where: Any
    ) -> torch.Tensor:
        ctx.save_for_backward(order)
        ctx.where = where
        return take_tokens(x, index, *_place(where))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (order,) = ctx.saved_tensors
        where: tuple[Any, ...] = (*ctx.where[:-1], f"the gradient of {ctx.where[-1]}")
        whole = all_gather_tokens(grads[0], order, *where)
        return whole, None, None, *[None] * len(ctx.where)


class _AllGatherSlice(Function):
    """The gradients of all ranks are equal: each takes its part."""

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
        return all_gather_tokens(x, order, *where)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        index, valid = ctx.saved_tensors
        mine = take_own_tokens(grads[0], index, valid, *_place(ctx.where))
        return mine, None, None, None, *[None] * len(ctx.where)


class _AllGatherReduceScatter(Function):
    """The gradients of all ranks are parts of a sum."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order: torch.Tensor, *where: Any) -> torch.Tensor:
        dim, outer, inner = _place(where)
        ctx.save_for_backward(order)
        ctx.where = where
        ctx.tokens = x.shape[dim] // (outer * inner)
        return all_gather_tokens(x, order, *where)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (order,) = ctx.saved_tensors
        mine = scatter_sum(grads[0], order, ctx.tokens, *ctx.where)
        return mine, None, *[None] * len(ctx.where)


class _SumPartials(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: str, what: str) -> torch.Tensor:
        total: torch.Tensor = collective_ops.all_reduce(x, group, what)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0], None, None


class _IdentityAllReduce(Function):
    """Identity forward; backward sums the gradient over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: str, what: str) -> torch.Tensor:
        ctx.settings = (group, f"the gradient of {what}")
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return collective_ops.all_reduce(grads[0], *ctx.settings), None, None


class _GradBucketWait(Function):
    """Identity; its backward waits for the all-reduce. It stands at the start of the program.

    Besides the tensors it gives a carrier, a view of one zero in the shape of the flat message,
    through which the summed message comes back. In backward autograd runs the first call last, so
    the wait comes after all other work. The tensors' own gradients only show which of them the loss
    reaches: the others get none, as in the unsplit program.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.shapes = [_real(t).shape for t in tensors]
        ctx.complex = [t.is_complex() for t in tensors]
        total = sum(shape.numel() for shape in ctx.shapes)
        carrier = _real(tensors[0]).new_zeros(()).expand(total)
        return (*(t.view_as(t) for t in tensors), carrier)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        flat = grads[-1]
        if flat is None:
            return (None,) * len(ctx.shapes)
        parts = collective_ops.finish_sum(flat, [shape.numel() for shape in ctx.shapes])
        shaped = [part.view(shape) for part, shape in zip(parts, ctx.shapes, strict=True)]
        return tuple(
            None if reached is None else torch.view_as_complex(x) if pairs else x
            for x, pairs, reached in zip(shaped, ctx.complex, grads[:-1], strict=True)
        )


class _GradBucketStart(Function):
    """Identity; its backward starts the all-reduce. It stands before the first use of a tensor."""

    @staticmethod
    def forward(ctx: Any, call: torch.Tensor, settings: tuple[Any, ...], *tensors: Any) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(call)
        ctx.settings = settings
        ctx.shapes = [t.shape for t in tensors[:-1]]
        return tuple(t.view_as(t) for t in tensors[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        (call,) = ctx.saved_tensors
        members, group, what = ctx.settings
        given = next((g for g in grads if g is not None), None)
        if given is None:
            return (None,) * (len(grads) + 3)
        parts = [
            given.new_zeros(shape) if g is None else g
            for g, shape in zip(grads, ctx.shapes, strict=True)
        ]
        reached = [NOT_REACHED if g is None else m for m, g in zip(members, grads, strict=False)]
        flat = collective_ops.begin_sum(parts, call, reached, group, what)
        marks = [None if g is None else _mark(g) for g in grads]
        return None, None, *marks, flat


def _mark(grad: torch.Tensor) -> torch.Tensor:
    """Stands for a gradient that travels in the flat message; one element of memory."""
    return grad.new_zeros(()).expand(grad.shape)


def _place(where: tuple[Any, ...]) -> tuple[int, int, int]:
    _ranks, _group, dim, outer, inner, _what = where
    return dim, outer, inner


def _real(x: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def _apply(function: type[torch.autograd.Function], *args: Any) -> torch.Tensor:
    return cast(torch.Tensor, function.apply(*args))  # type: ignore[no-untyped-call]


def slice_tokens(
    x: torch.Tensor, index: torch.Tensor, order: torch.Tensor,
    ranks: int, group: str, dim: int, outer: int, inner: int, what: str,
) -> torch.Tensor:  # fmt: skip
    """This rank's tokens of a whole value; backward all-gathers."""
    if not x.requires_grad:
        return take_tokens(x, index, dim, outer, inner)
    return _apply(_Slice, x, index, order, ranks, group, dim, outer, inner, what)


def all_gather_grad_slice(
    x: torch.Tensor, index: torch.Tensor, order: torch.Tensor, valid: torch.Tensor,
    ranks: int, group: str, dim: int, outer: int, inner: int, what: str,
) -> torch.Tensor:  # fmt: skip
    """A sharded value, replicated for computations that every rank repeats."""
    return _apply(_AllGatherSlice, x, index, order, valid, ranks, group, dim, outer, inner, what)


def all_gather_grad_reduce_scatter(
    x: torch.Tensor, order: torch.Tensor,
    ranks: int, group: str, dim: int, outer: int, inner: int, what: str,
) -> torch.Tensor:  # fmt: skip
    """A sharded value, replicated for computations that each rank does for its own tokens."""
    return _apply(_AllGatherReduceScatter, x, order, ranks, group, dim, outer, inner, what)


def sum_partials(x: torch.Tensor, group: str, what: str) -> torch.Tensor:
    """The sum over ranks of a partial sum, on every rank."""
    return _apply(_SumPartials, x, group, what)


def identity_grad_all_reduce(x: torch.Tensor, group: str, what: str) -> torch.Tensor:
    """A replicated value that each rank uses for its own tokens; gradients are summed."""
    return _apply(_IdentityAllReduce, x, group, what)


def grad_bucket_wait(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The tensors of a bucket and its carrier, for ``grad_bucket_start``."""
    entered = _GradBucketWait.apply(*tensors)  # type: ignore[no-untyped-call]
    return cast(tuple[torch.Tensor, ...], entered)


def grad_bucket_start(
    entered: tuple[torch.Tensor, ...], call: torch.Tensor, members: list[int], group: str, what: str
) -> tuple[torch.Tensor, ...]:
    """The tensors of a bucket, for computations that each rank does for its own tokens.

    ``call`` and ``members`` tell a parameter's gradient from others, see
    ``ringfx.comm.grad_accumulation``.
    """
    shared = _GradBucketStart.apply(call, (members, group, what), *entered)  # type: ignore[no-untyped-call]
    return cast(tuple[torch.Tensor, ...], shared)
