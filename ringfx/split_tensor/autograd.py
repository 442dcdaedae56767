"""From a program's results to split tensors and back to its inputs, with their gradients."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import torch

from ringfx.comm.autograd_function import Function
from ringfx.comm.conjugate import mask_tokens, take_own_tokens
from ringfx.failures.channel import next_number
from ringfx.split_tensor.spec import GatherObserver, SplitSpec
from ringfx.split_tensor.tensor import Cell, SplitTensor
from ringfx.torch_compat.autograd import storage_id

__all__ = ["part", "wrap", "wrap_all"]


class _Wrap(Function):
    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, spec: SplitSpec, cell: Cell) -> torch.Tensor:
        ctx.spec = spec
        return SplitTensor(cell, spec)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (grad,) = grads
        spec: SplitSpec = ctx.spec
        index, valid = spec.index(grad.device)
        if isinstance(grad, SplitTensor) and grad._spec == spec:
            local = grad.to_local()
            return mask_tokens(local, valid, 0, spec.dim, spec.outer, spec.inner), None, None
        grad = whole_gradient(grad)
        return take_own_tokens(grad, index, valid, spec.dim, spec.outer, spec.inner), None, None


class _Part(Function):
    """This rank's tokens; backward gives a gradient that is split as the value."""

    @staticmethod
    def forward(ctx: Any, split: SplitTensor, on_gather: GatherObserver | None) -> torch.Tensor:
        ctx.spec, ctx.on_gather = split._spec, on_gather
        return split.to_local().detach().contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        spec = dataclasses.replace(
            ctx.spec,
            name=f"the gradient of {ctx.spec.name}",
            number=f"gradient {next_number(ctx.spec.group)}",
        )
        return SplitTensor(Cell(grads[0], on_gather=ctx.on_gather), spec), None


def wrap(
    local: torch.Tensor, spec: SplitSpec, on_gather: GatherObserver | None = None
) -> torch.Tensor:
    """This rank's part as a tensor of the global shape, differentiable.

    ``on_gather`` is called for every gather of it and of values computed from it.
    """
    numbered = dataclasses.replace(spec, number=next_number(spec.group))
    cell = Cell(local.detach(), on_gather=on_gather)
    wrapped: torch.Tensor = _Wrap.apply(local, numbered, cell)  # type: ignore[no-untyped-call]
    return wrapped


def wrap_all(
    results: Sequence[Any],
    specs: Sequence[SplitSpec | None],
    on_gather: GatherObserver | None = None,
) -> list[Any]:
    """The results of a program; those that are one value, or views of one, stay that."""
    wrapped = [
        _with_whole_gradient(result) if spec is None else wrap(result, spec, on_gather)
        for result, spec in zip(results, specs, strict=True)
    ]
    split = [x for x in wrapped if isinstance(x, SplitTensor)]
    for value, other in itertools.combinations(split, 2):
        mine, its = value._local, other._local
        if storage_id(mine) != storage_id(its):
            continue
        if value._spec == other._spec and _place_in_memory(mine) == _place_in_memory(its):
            other._cell = value._cell
            value._cell.aliased = True
        else:
            value._hand_out()
            other._hand_out()
    return wrapped


def _with_whole_gradient(result: Any) -> Any:
    """A whole result: its program's backward holds this rank's tokens, which a split gradient,
    were it computed with as it is, would take for those of all ranks."""
    if isinstance(result, torch.Tensor) and result.grad_fn is not None:
        result.register_hook(whole_gradient)  # type: ignore[no-untyped-call]
    return result


@torch.compiler.disable  # type: ignore[untyped-decorator]
def whole_gradient(grad: torch.Tensor) -> torch.Tensor:
    """A gradient as a plain tensor."""
    return grad._gathered() if isinstance(grad, SplitTensor) else grad


def _place_in_memory(x: torch.Tensor) -> tuple[Any, ...]:
    return x.storage_offset(), x.shape, x.stride(), x.dtype


def part(split: SplitTensor, on_gather: GatherObserver | None = None) -> torch.Tensor:
    """This rank's tokens, differentiable; ``on_gather`` is called if the gradient is gathered."""
    mine: torch.Tensor = _Part.apply(split, on_gather)  # type: ignore[no-untyped-call]
    return mine
