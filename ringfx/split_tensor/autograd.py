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
from ringfx.ops.chunked import Body
from ringfx.passes.capture.precision import autocast_off
from ringfx.split_tensor.cell import Cell
from ringfx.split_tensor.deferred import Deferred
from ringfx.split_tensor.spec import GatherObserver, SplitSpec
from ringfx.split_tensor.tensor import SplitTensor
from ringfx.torch_compat.autograd import storage_id

__all__ = ["part", "wrap", "wrap_all", "wrap_deferred"]


class _Wrap(Function):
    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, spec: SplitSpec, cell: Cell) -> torch.Tensor:
        ctx.spec = spec
        return SplitTensor(cell, spec)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return _local_gradient(grads[0], ctx.spec), None, None


class _Defer(Function):
    """A part that is computed when it is touched; so are its gradients, when there is one."""

    @staticmethod
    def forward(ctx: Any, spec: SplitSpec, cell: Cell, *operands: torch.Tensor) -> torch.Tensor:
        assert isinstance(cell.held, Deferred)
        ctx.spec, ctx.deferred = spec, cell.held
        return SplitTensor(cell, spec)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        wanted = [i for i, needs in enumerate(ctx.needs_input_grad[2:]) if needs]
        local = _local_gradient(grads[0], ctx.spec)
        found = _gradients(ctx.deferred, local, wanted)
        gradients: list[torch.Tensor | None] = [None] * len(ctx.needs_input_grad[2:])
        for i, gradient in zip(wanted, found, strict=True):
            gradients[i] = gradient
        return None, None, *gradients


def _gradients(
    deferred: Deferred, grad: torch.Tensor, wanted: Sequence[int]
) -> Sequence[torch.Tensor]:
    """Of the operands, from chunk to chunk."""
    body = deferred.body
    (place,) = body.results
    operands = deferred.operands()
    assert place is not None, "a value that is deferred has tokens"
    totals = [torch.zeros_like(operands[i]) for i in wanted]
    for start, stop in body.chunks():
        parts = [x.detach() for x in body.part(operands, start, stop)]
        for i in wanted:
            parts[i].requires_grad_()
        with torch.enable_grad(), autocast_off():
            (result,) = body.program(*parts)
        mine = place.part(grad, start, stop).to(result.dtype)
        with autocast_off():
            found = torch.autograd.grad(result, [parts[i] for i in wanted], mine)
        for i, total, x in zip(wanted, totals, found, strict=True):
            at = body.operands[i]
            if at is None:
                total.add_(x)
            else:
                at.write(total, start, x)
    return totals


def _local_gradient(grad: torch.Tensor, spec: SplitSpec) -> torch.Tensor:
    """This rank's tokens of a gradient, split or whole."""
    index, valid = spec.index(grad.device)
    if isinstance(grad, SplitTensor) and grad._spec == spec:
        return mask_tokens(grad.to_local(), valid, 0, spec.dim, spec.outer, spec.inner)
    grad = whole_gradient(grad)
    return take_own_tokens(grad, index, valid, spec.dim, spec.outer, spec.inner)


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


def wrap_deferred(
    body: Body,
    operands: Sequence[torch.Tensor],
    spec: SplitSpec,
    on_gather: GatherObserver | None = None,
) -> torch.Tensor:
    """A result that is computed when it is touched, as a tensor of the global shape.

    ``operands``: of ``body``, with the gradients that each rank has a part of to be summed.
    """
    numbered = dataclasses.replace(spec, number=next_number(spec.group))
    deferred = Deferred(body, operands, spec.name, body.values[0].dtype)
    cell = Cell(deferred, on_gather=on_gather)
    wrapped: torch.Tensor = _Defer.apply(numbered, cell, *operands)  # type: ignore[no-untyped-call]
    return wrapped


def is_deferred(x: SplitTensor) -> bool:
    return isinstance(x._cell.held, Deferred)


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
    split = [x for x in wrapped if isinstance(x, SplitTensor) and not is_deferred(x)]
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
