"""The operators of tile functions: all that one of them is, in one row of one table.

A new operator is one row here and one in the graph's own table (``passes/exprs/elements``). What
passes know of an operator beyond this stands in their own tables, keyed by the same names:
``NORMAL_FORMS`` (exprs/simplify.py), ``RANGE_RULES`` (exprs/ranged.py), ``SCORE_RULES``
(masks/read_scores.py).
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from ringfx.ir.tiles import intervals
from ringfx.ir.tiles.intervals import Interval
from ringfx.torch_compat.releases import clamp_tie

__all__ = ["COMPARISONS", "TILE_OPS", "UNTRAINED", "Pull", "TileOp", "as_tensor"]

Tensor = torch.Tensor
Pull: TypeAlias = Callable[..., tuple[Tensor | None, ...]]
"""(gradient, values of the result, *values of the operands) -> gradient of each operand."""


@dataclass(frozen=True, kw_only=True)
class TileOp:
    """One operator; None says that there is nothing of the kind."""

    arity: int
    evaluate: Callable[..., Any]
    """Its values; operands are tensors, or Python numbers with a number's types."""
    fold: Callable[..., Any] | None = None
    """Its value where all operands are Python numbers; None: it is left as it is."""
    bounds: Callable[..., Interval] | None = None
    """An interval that holds its values, given one for each operand; None: unbounded."""
    pull: Pull | None = None
    """Its gradient; None: a bias cannot be trained through it."""
    infix: str | None = None
    """The sign between its operands; None: it is written as a call."""


def _is_beyond(x: Any) -> bool:
    """Whether a number is beyond the default type: float64's most negative."""
    largest = torch.finfo(torch.get_default_dtype()).max
    return not isinstance(x, Tensor) and math.isfinite(x) and abs(x) > largest


def as_tensor(x: Any) -> Tensor:
    """A tensor as it is, a number in the default type, or in float64 where that is too small."""
    return torch.as_tensor(x, dtype=torch.float64 if _is_beyond(x) else None)


def _on_tensors(operation: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """For operations that take no Python numbers."""
    return lambda *args: operation(*map(as_tensor, args))


def _minimum(a: Any, b: Any) -> Any:
    if not isinstance(b, Tensor):
        return torch.clamp(as_tensor(a), max=b)
    return torch.minimum(a, b) if isinstance(a, Tensor) else torch.clamp(b, max=a)


def _maximum(a: Any, b: Any) -> Any:
    if not isinstance(b, Tensor):
        return torch.clamp(as_tensor(a), min=b)
    return torch.maximum(a, b) if isinstance(a, Tensor) else torch.clamp(b, min=a)


def _choose(condition: Any, a: Any, b: Any) -> Tensor:
    """Two numbers make the default type, or float64 where one of them needs it."""
    if _is_beyond(a) or _is_beyond(b):
        a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    return torch.where(torch.as_tensor(condition), a, b)


def _function(evaluate: Callable[..., Tensor], pull: Pull | None = None, arity: int = 1) -> TileOp:
    """A function of tensors, of which only its values and its gradient are known."""
    return TileOp(arity=arity, evaluate=_on_tensors(evaluate), pull=pull)


def _comparison(
    evaluate: Callable[..., Any], bounds: Callable[..., Interval], infix: str
) -> TileOp:
    return TileOp(arity=2, evaluate=evaluate, fold=evaluate, bounds=bounds, infix=infix)


def _cast(
    dtype: torch.dtype, fold: type | None = None, bounds: Callable[..., Interval] | None = None
) -> TileOp:
    """A Python number is not rounded to the default type on its way to a wider one."""
    pull: Pull | None = (lambda g, r, a: (g,)) if dtype.is_floating_point else None
    to_dtype = functools.partial(torch.as_tensor, dtype=dtype)
    return TileOp(arity=1, evaluate=to_dtype, fold=fold, bounds=bounds, pull=pull)


def _pull_power(g: Tensor, r: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor | None, ...]:
    """As torch: x**0 is flat, and 0**y where it is a number."""
    of_base = torch.where(b == 0, 0.0, g * b * a ** torch.where(b == 0, 1, b - 1))
    nothing = (a == 0) & (b >= 0)
    of_power = torch.where(nothing, 0.0, g * r * torch.log(torch.where(nothing, 1, a)))
    return of_base, of_power


def _larger(a: Tensor, b: Tensor, tie: float) -> Tensor:
    """1 where a is the larger one, 0 where b is, ``tie`` where they are equal."""
    return torch.where(a == b, tie, torch.where(a > b, 1.0, 0.0))


def _flat(g: Tensor, r: Tensor, a: Tensor) -> tuple[Tensor | None, ...]:
    return (torch.zeros_like(a),)


_COMPARISONS: Mapping[str, TileOp] = {
    "le": _comparison(operator.le, intervals.le, "<="),
    "lt": _comparison(operator.lt, intervals.lt, "<"),
    "ge": _comparison(operator.ge, lambda a, b: intervals.le(b, a), ">="),
    "gt": _comparison(operator.gt, lambda a, b: intervals.lt(b, a), ">"),
    "eq": _comparison(operator.eq, intervals.eq, "=="),
    "ne": _comparison(operator.ne, intervals.ne, "!="),
}
COMPARISONS = frozenset(_COMPARISONS)

TILE_OPS: Mapping[str, TileOp] = {
    "add": TileOp(arity=2, evaluate=operator.add, fold=operator.add, bounds=intervals.add,
                  pull=lambda g, r, a, b: (g, g), infix="+"),
    "sub": TileOp(arity=2, evaluate=operator.sub, fold=operator.sub, bounds=intervals.sub,
                  pull=lambda g, r, a, b: (g, -g), infix="-"),
    "mul": TileOp(arity=2, evaluate=operator.mul, fold=operator.mul, bounds=intervals.mul,
                  pull=lambda g, r, a, b: (g * b, g * a), infix="*"),
    "div": TileOp(arity=2, evaluate=operator.truediv, fold=operator.truediv,
                  pull=lambda g, r, a, b: (g / b, -g * a / (b * b)), infix="/"),
    "floordiv": TileOp(arity=2, evaluate=operator.floordiv, fold=operator.floordiv,
                       bounds=intervals.floordiv, infix="//"),
    "truncdiv": TileOp(arity=2, bounds=intervals.truncdiv,
                       evaluate=lambda a, b: torch.div(as_tensor(a), b, rounding_mode="trunc")),
    "mod": TileOp(arity=2, evaluate=operator.mod, fold=operator.mod, bounds=intervals.mod,
                  infix="%"),
    "fmod": TileOp(arity=2, evaluate=lambda a, b: torch.fmod(as_tensor(a), b)),
    "pow": TileOp(arity=2, evaluate=operator.pow, pull=_pull_power),
    "min": TileOp(arity=2, evaluate=_minimum, fold=min, bounds=intervals.minimum,
                  pull=lambda g, r, a, b: (g * _larger(b, a, 0.5), g * _larger(a, b, 0.5))),
    "max": TileOp(arity=2, evaluate=_maximum, fold=max, bounds=intervals.maximum,
                  pull=lambda g, r, a, b: (g * _larger(a, b, 0.5), g * _larger(b, a, 0.5))),
    "clamp_min": TileOp(arity=2, evaluate=_maximum, fold=max, bounds=intervals.maximum,
                        pull=lambda g, r, a, b: (g * _larger(a, b, clamp_tie()), g * (a < b))),
    "clamp_max": TileOp(arity=2, evaluate=_minimum, fold=min, bounds=intervals.minimum,
                        pull=lambda g, r, a, b: (g * _larger(b, a, clamp_tie()), g * (a > b))),
    "neg": TileOp(arity=1, evaluate=operator.neg, fold=operator.neg, bounds=intervals.neg,
                  pull=lambda g, r, a: (-g,)),
    "abs": TileOp(arity=1, evaluate=abs, fold=abs, bounds=intervals.absolute,
                  pull=lambda g, r, a: (g * torch.sign(a),)),
    **_COMPARISONS,
    "and": TileOp(arity=2, evaluate=_on_tensors(torch.logical_and), infix="and",
                  fold=lambda a, b: bool(a) and bool(b), bounds=intervals.logical_and),
    "or": TileOp(arity=2, evaluate=_on_tensors(torch.logical_or), infix="or",
                 fold=lambda a, b: bool(a) or bool(b), bounds=intervals.logical_or),
    "xor": TileOp(arity=2, evaluate=_on_tensors(torch.logical_xor), infix="!=",
                  fold=lambda a, b: bool(a) != bool(b), bounds=intervals.logical_xor),
    "not": TileOp(arity=1, evaluate=_on_tensors(torch.logical_not), fold=operator.not_,
                  bounds=intervals.logical_not),
    "bitand": _function(torch.bitwise_and, arity=2),
    "bitor": _function(torch.bitwise_or, arity=2),
    "bitxor": _function(torch.bitwise_xor, arity=2),
    "where": TileOp(arity=3, evaluate=_choose, fold=lambda c, a, b: a if c else b,
                    bounds=intervals.where,
                    pull=lambda g, r, c, a, b: (None, torch.where(c, g, 0), torch.where(c, 0, g))),
    "exp": _function(torch.exp, lambda g, r, a: (g * r,)),
    "log": _function(torch.log, lambda g, r, a: (g / a,)),
    "log2": _function(torch.log2, lambda g, r, a: (g / (a * math.log(2)),)),
    "log1p": _function(torch.log1p, lambda g, r, a: (g / (1 + a),)),
    "sqrt": _function(torch.sqrt, lambda g, r, a: (g / (2 * r),)),
    "rsqrt": _function(torch.rsqrt, lambda g, r, a: (-g * r / (2 * a),)),
    "reciprocal": _function(torch.reciprocal, lambda g, r, a: (-g * r * r,)),
    "tanh": _function(torch.tanh, lambda g, r, a: (g * (1 - r * r),)),
    "sigmoid": _function(torch.sigmoid, lambda g, r, a: (g * r * (1 - r),)),
    "softplus": _function(torch.nn.functional.softplus, lambda g, r, a: (g * torch.sigmoid(a),)),
    "relu": _function(torch.relu, lambda g, r, a: (g * (a > 0),)),
    "sin": _function(torch.sin, lambda g, r, a: (g * torch.cos(a),)),
    "cos": _function(torch.cos, lambda g, r, a: (-g * torch.sin(a),)),
    "sign": _function(torch.sign, _flat),
    "floor": _function(torch.floor, _flat),
    "ceil": _function(torch.ceil, _flat),
    "round": _function(torch.round, _flat),
    "trunc": _function(torch.trunc, _flat),
    "isinf": _function(torch.isinf),
    "isnan": _function(torch.isnan),
    "int": _cast(torch.int64, int, intervals.integer),
    "float": _cast(torch.float32, float),
    "double": _cast(torch.float64, float),
    "half": _cast(torch.float16),
    "bfloat16": _cast(torch.bfloat16),
    "bool": _cast(torch.bool, bool, intervals.truth),
}  # fmt: skip
UNTRAINED = COMPARISONS | {"and", "or", "xor", "not", "bool", "int", "isinf", "isnan"}
"""Truth values and integers: no gradient flows through them, in torch neither."""
