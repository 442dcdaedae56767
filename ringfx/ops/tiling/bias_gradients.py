"""Gradients of captured tensors through a bias or score map: reverse-mode over the tile expression.

The values of a tile are ``evaluate(expr, index, inputs)``; given their gradient this adds to the
gradient of each input that asked for one, and to that of the scores of a score map. An operator
without a gradient (``TileOp.pull``) above such an input is an error, never a lost gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ringfx.errors import InvalidArgument
from ringfx.ir.tiles import SCORE, TILE_OPS, Expr, TileIndex, children, evaluate, reads, walk
from ringfx.ir.tiles.operators import UNTRAINED

__all__ = ["add", "refuse_unsupported"]

Tensor = torch.Tensor


def _reads_any(expr: Expr, wanted: Sequence[int]) -> bool:
    return any(read[1] in wanted for read in reads(expr))


def refuse_unsupported(expr: Expr, wanted: Sequence[int], layer: str) -> None:
    """Raises where a gradient is wanted through an operator that has no row."""
    if expr[0] == "at" or expr[0] in UNTRAINED or not _reads_any(expr, wanted):
        return
    if TILE_OPS[expr[0]].pull is None:
        known = ", ".join(name for name, op in TILE_OPS.items() if op.pull is not None)
        raise InvalidArgument(
            f"{layer or 'attention'}: the bias needs the gradient of a captured tensor through "
            f'"{expr[0]}", which has none here; known: {known}. '
            "Do: build the bias from these, or detach the tensor if it is not trained."
        )
    for part in children(expr):
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
    *,
    of_scores: Tensor | None = None,
) -> None:
    """Adds to ``sums[i]`` the gradient of ``inputs[i]``, given that of the expression's values.

    Parameters
    ----------
    of_scores
        [B, H, Q, K]: what the gradient of a score map's scores is added to.
    """
    wanted = [i for i, total in enumerate(sums) if total is not None]
    maps = of_scores is not None and SCORE in walk(expr)
    if not maps and not _reads_any(expr, wanted):
        return
    head, *args = expr
    if head == "score":
        assert of_scores is not None, "looked for"
        of_scores.add_(gradient_BHQK)
        return
    if head == "at":
        _add_read(args[0], args[1:], gradient_BHQK, index, inputs, sums)
        return
    if head in UNTRAINED:
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
            add(part, summed, index, inputs, sums, of_scores=of_scores)


def _add_read(
    i: int,
    at: Sequence[Expr],
    gradient_BHQK: Tensor,
    index: TileIndex,
    inputs: Sequence[Tensor],
    sums: Sequence[Tensor | None],
) -> None:
    total = sums[i]
    assert total is not None, "only inputs that asked for a gradient are reached"
    if not at:  # one number
        total.add_(gradient_BHQK.sum().to(total.dtype))
        return
    places = tuple(evaluate(e, index, inputs) for e in at)
    shape = inputs[i][places].shape
    summed = gradient_BHQK.sum_to_size(shape).to(total.dtype)
    total.index_put_(places, summed, accumulate=True)
