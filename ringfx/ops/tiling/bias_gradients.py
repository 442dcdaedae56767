"""Gradients of captured tensors through a bias: reverse-mode over the tile expression.

The bias of a tile is ``evaluate(bias, index, inputs)``; given the gradient of its values this adds
to the gradient of each input that asked for one, for the operators that learned biases are made of.
An operator without a gradient (``TileOp.pull``) above such an input is an error, never a lost
gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ringfx.errors import InvalidArgument
from ringfx.ir.tiles import TILE_OPS, Expr, TileIndex, children, evaluate, reads

__all__ = ["add", "refuse_unsupported"]

Tensor = torch.Tensor


def _reads_any(expr: Expr, wanted: Sequence[int]) -> bool:
    return any(read[1] in wanted for read in reads(expr))


def refuse_unsupported(bias: Expr, wanted: Sequence[int], layer: str) -> None:
    """Raises where a gradient is wanted through an operator that has no row."""
    if bias[0] == "at" or not _reads_any(bias, wanted):
        return
    if TILE_OPS[bias[0]].pull is None:
        known = ", ".join(name for name, op in TILE_OPS.items() if op.pull is not None)
        raise InvalidArgument(
            f"{layer or 'attention'}: the bias needs the gradient of a captured tensor through "
            f'"{bias[0]}", which has none here; known: {known}. '
            "Do: build the bias from these, or detach the tensor if it is not trained."
        )
    for part in children(bias):
        refuse_unsupported(part, wanted, layer)


def _value(expr: Expr, index: TileIndex, inputs: Sequence[Tensor]) -> Tensor:
    """A number in double precision: it gives its type to no tensor, and must not be rounded."""
    if expr[0] == "const" and isinstance(expr[1], float):
        return torch.tensor(expr[1], dtype=torch.float64, device=index.q.device)
    return evaluate(expr, index, inputs)


def add(
    expr: Expr,
    gradient_BHQK: Tensor,
    index: TileIndex,
    inputs: Sequence[Tensor],
    sums: Sequence[Tensor | None],
) -> None:
    """Adds to ``sums[i]`` the gradient of ``inputs[i]``, given that of the expression's values."""
    wanted = [i for i, total in enumerate(sums) if total is not None]
    if not _reads_any(expr, wanted):
        return
    head, *args = expr
    if head == "at":
        total = sums[args[0]]
        assert total is not None, "only inputs that asked for a gradient are reached"
        places = [evaluate(e, index, inputs) for e in args[1:]]
        shape = inputs[args[0]][tuple(places)].shape
        summed = gradient_BHQK.sum_to_size(shape).to(total.dtype)
        total.index_put_(tuple(places), summed, accumulate=True)
        return
    values = [_value(e, index, inputs) for e in args]
    result = evaluate(expr, index, inputs)
    pull = TILE_OPS[head].pull
    assert pull is not None, "refuse_unsupported has seen the expression"
    pulled = pull(gradient_BHQK, result, *values)
    for part, value, gradient in zip(args, values, pulled, strict=True):
        if gradient is not None:
            ones = (1,) * (gradient.dim() - value.dim())
            summed = gradient.sum_to_size(ones + tuple(value.shape))
            add(part, summed, index, inputs, sums)
