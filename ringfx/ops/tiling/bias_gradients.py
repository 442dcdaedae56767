"""Gradients of captured tensors through a bias: reverse-mode over the tile expression.

The bias of a tile is ``evaluate(bias, index, inputs)``; given the gradient of its values this adds
to the gradient of each input that asked for one, for the operators that learned biases are made of.
An operator that has no row here and stands above such an input is an error, never a lost gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from ringfx.errors import InvalidArgument
from ringfx.ir.tiles import Expr, TileIndex, evaluate, walk

__all__ = ["add", "refuse_unsupported"]

Tensor = torch.Tensor
Pull = Callable[..., tuple[Tensor | None, ...]]
"""(gradient, value of the result, *values of the arguments) -> gradient of each argument."""

PULL_RULES: Mapping[str, Pull] = {
    "add": lambda g, r, a, b: (g, g),
    "sub": lambda g, r, a, b: (g, -g),
    "mul": lambda g, r, a, b: (g * b, g * a),
    "div": lambda g, r, a, b: (g / b, -g * a / (b * b)),
    "neg": lambda g, r, a: (-g,),
    "exp": lambda g, r, a: (g * r,),
    "log": lambda g, r, a: (g / a,),
    "sqrt": lambda g, r, a: (g / (2 * r),),
    "tanh": lambda g, r, a: (g * (1 - r * r),),
    "sigmoid": lambda g, r, a: (g * r * (1 - r),),
    "softplus": lambda g, r, a: (g * torch.sigmoid(a),),
    "relu": lambda g, r, a: (g * (a > 0),),
    "log1p": lambda g, r, a: (g / (1 + a),),
    "log2": lambda g, r, a: (g / (a * math.log(2)),),
    "rsqrt": lambda g, r, a: (-g * r / (2 * a),),
    "reciprocal": lambda g, r, a: (-g * r * r,),
    "sin": lambda g, r, a: (g * torch.cos(a),),
    "cos": lambda g, r, a: (-g * torch.sin(a),),
    "abs": lambda g, r, a: (g * torch.sign(a),),
    "where": lambda g, r, c, a, b: (None, torch.where(c, g, 0), torch.where(c, 0, g)),
    "float": lambda g, r, a: (g,),
    "double": lambda g, r, a: (g,),
    "half": lambda g, r, a: (g,),
    "bfloat16": lambda g, r, a: (g,),
}


def _reads(expr: Expr, wanted: Sequence[int]) -> bool:
    return any(part[0] == "at" and part[1] in wanted for part in walk(expr))


def refuse_unsupported(bias: Expr, wanted: Sequence[int], layer: str) -> None:
    """Raises where a gradient is wanted through an operator that has no row."""
    head, *args = bias
    if head == "at" or not _reads(bias, wanted):
        return
    if head not in PULL_RULES:
        raise InvalidArgument(
            f"{layer or 'attention'}: the bias needs the gradient of a captured tensor through "
            f'"{head}", which has none here; known: {", ".join(PULL_RULES)}. '
            "Do: build the bias from these, or detach the tensor if it is not trained."
        )
    for part in args:
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
    if not _reads(expr, wanted):
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
    pulled = PULL_RULES[head](gradient_BHQK, result, *values)
    for part, value, gradient in zip(args, values, pulled, strict=True):
        if gradient is not None:
            ones = (1,) * (gradient.dim() - value.dim())
            summed = gradient.sum_to_size(ones + tuple(value.shape))
            add(part, summed, index, inputs, sums)
