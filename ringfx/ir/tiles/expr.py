"""Tile functions: masks and biases of attention as functions of global indices.

A score matrix of S x S entries is never stored. What a model says about it (causal, window, packed
documents, padding, ALiBi, relative buckets, a matrix given as input) is an expression over four
index variables and a few captured tensors, evaluated on one tile at a time with that tile's global
positions. The expression is a nested tuple of plain values, so that it can be compared, hashed,
printed, written as JSON and sent as the argument of an operator:

    ("b",) ("h",) ("q",) ("k",)      index of batch, head, query token, key token
    ("row",)                         place of the query among this rank's own
    ("const", 3)                     a number
    ("at", i, e0, e1, ...)           inputs[i][e0, e1, ...]
    (name, e0, ...)                  a row of TILE_OPS

    causal, window of 4096           ("and", ("le", k, q), ("gt", k, ("sub", q, ("const", 4096))))
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

__all__ = [
    "CAUSAL",
    "TILE_OPS",
    "Expr",
    "TileIndex",
    "conjunction",
    "depth",
    "dumps",
    "evaluate",
    "inputs_used",
    "loads",
    "of_own_rows",
    "own_rows",
    "rows_read",
    "terms",
    "walk",
]

Expr: TypeAlias = tuple[Any, ...]

INDICES = ("b", "h", "q", "k", "row")
B: Expr = ("b",)
H: Expr = ("h",)
Q: Expr = ("q",)
K: Expr = ("k",)
ROW: Expr = ("row",)
CAUSAL: Expr = ("le", K, Q)


def _is_beyond(x: Any) -> bool:
    """Whether a number is beyond the default type: float64's most negative."""
    largest = torch.finfo(torch.get_default_dtype()).max
    return not isinstance(x, torch.Tensor) and math.isfinite(x) and abs(x) > largest


def _tensor(x: Any) -> torch.Tensor:
    return torch.as_tensor(x, dtype=torch.float64 if _is_beyond(x) else None)


def _on_tensors(operation: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """For operations that take no Python numbers."""
    return lambda *args: operation(*map(_tensor, args))


def _cast(dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """A Python number is not rounded to the default type on its way to a wider one."""
    return lambda a: torch.as_tensor(a, dtype=dtype)


def _minimum(a: Any, b: Any) -> Any:
    if not isinstance(b, torch.Tensor):
        return torch.clamp(_tensor(a), max=b)
    return torch.minimum(a, b) if isinstance(a, torch.Tensor) else torch.clamp(b, max=a)


def _maximum(a: Any, b: Any) -> Any:
    if not isinstance(b, torch.Tensor):
        return torch.clamp(_tensor(a), min=b)
    return torch.maximum(a, b) if isinstance(a, torch.Tensor) else torch.clamp(b, min=a)


def _where(condition: Any, a: Any, b: Any) -> torch.Tensor:
    """Two numbers make the default type, or float64 where one of them needs it."""
    if _is_beyond(a) or _is_beyond(b):
        a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    return torch.where(torch.as_tensor(condition), a, b)


TILE_OPS: Mapping[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "floordiv": operator.floordiv,
    "truncdiv": lambda a, b: torch.div(_tensor(a), b, rounding_mode="trunc"),
    "mod": operator.mod,
    "fmod": lambda a, b: torch.fmod(_tensor(a), b),
    "neg": operator.neg,
    "abs": abs,
    "pow": operator.pow,
    "min": _minimum,
    "max": _maximum,
    "le": operator.le,
    "lt": operator.lt,
    "ge": operator.ge,
    "gt": operator.gt,
    "eq": operator.eq,
    "ne": operator.ne,
    "and": _on_tensors(torch.logical_and),
    "or": _on_tensors(torch.logical_or),
    "xor": _on_tensors(torch.logical_xor),
    "not": _on_tensors(torch.logical_not),
    "bitand": _on_tensors(torch.bitwise_and),
    "bitor": _on_tensors(torch.bitwise_or),
    "bitxor": _on_tensors(torch.bitwise_xor),
    "where": _where,
    "exp": _on_tensors(torch.exp),
    "log": _on_tensors(torch.log),
    "log2": _on_tensors(torch.log2),
    "log1p": _on_tensors(torch.log1p),
    "sqrt": _on_tensors(torch.sqrt),
    "rsqrt": _on_tensors(torch.rsqrt),
    "reciprocal": _on_tensors(torch.reciprocal),
    "tanh": _on_tensors(torch.tanh),
    "sigmoid": _on_tensors(torch.sigmoid),
    "softplus": _on_tensors(torch.nn.functional.softplus),
    "relu": _on_tensors(torch.relu),
    "sin": _on_tensors(torch.sin),
    "cos": _on_tensors(torch.cos),
    "sign": _on_tensors(torch.sign),
    "floor": _on_tensors(torch.floor),
    "ceil": _on_tensors(torch.ceil),
    "round": _on_tensors(torch.round),
    "trunc": _on_tensors(torch.trunc),
    "isinf": _on_tensors(torch.isinf),
    "isnan": _on_tensors(torch.isnan),
    "int": _cast(torch.int64),
    "float": _cast(torch.float32),
    "double": _cast(torch.float64),
    "half": _cast(torch.float16),
    "bfloat16": _cast(torch.bfloat16),
    "bool": _cast(torch.bool),
}
"""What each operator computes; operands are tensors, or Python numbers with a number's types."""


@dataclass(frozen=True, eq=False)
class TileIndex:
    """Global indices of one tile: int64 vectors of batch, head, query and key."""

    b: torch.Tensor
    h: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    row: torch.Tensor | None = None
    """Places of the queries among this rank's own; None where they are not known."""

    def broadcast(self, name: str) -> torch.Tensor:
        """The named vector shaped to broadcast over [B, H, Q, K]."""
        shape = [1, 1, 1, 1]
        shape["bhqk".index("q" if name == "row" else name)] = -1
        vector: torch.Tensor | None = getattr(self, name)
        assert vector is not None, "a rank's own rows are read where they are known"
        return vector.view(shape)


def evaluate(expr: Expr, index: TileIndex, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """The expression's values on one tile, broadcastable to [B, H, Q, K]."""
    return _tensor(_evaluate(expr, index, inputs)).to(index.q.device)


def _evaluate(expr: Expr, index: TileIndex, inputs: Sequence[torch.Tensor]) -> Any:
    """A constant stays a Python number: as in a model's code, it decides no type."""
    head, *args = expr
    if head in INDICES:
        return index.broadcast(head)
    if head == "const":
        return args[0]
    if head == "at":
        places = [_evaluate(e, index, inputs) for e in args[1:]]
        return inputs[args[0]][tuple(places)]
    return TILE_OPS[head](*(_evaluate(e, index, inputs) for e in args))


def walk(expr: Expr) -> Iterator[Expr]:
    """The expression and everything inside it, outermost first."""
    yield expr
    for part in _parts(expr):
        yield from walk(part)


def depth(expr: Expr) -> int:
    """How many parts stand inside each other."""
    deepest, level = 0, [expr]
    while level:
        deepest += 1
        level = [part for e in level for part in _parts(e)]
    return deepest


def _parts(expr: Expr) -> tuple[Expr, ...]:
    if expr[0] == "const" or expr[0] in INDICES:
        return ()
    return tuple(expr[2:] if expr[0] == "at" else expr[1:])


def inputs_used(expr: Expr | None) -> tuple[int, ...]:
    """Positions of the captured tensors that the expression reads, ascending."""
    if expr is None:
        return ()
    return tuple(sorted({e[1] for e in walk(expr) if e[0] == "at"}))


def rows_read(*exprs: Expr | None) -> Mapping[int, int]:
    """Captured tensors that are read at the query's own row only: position -> dim of the rows."""
    found: dict[int, int | None] = {}
    for read in (e for expr in exprs if expr is not None for e in walk(expr) if e[0] == "at"):
        at = [d for d, place in enumerate(read[2:]) if place == Q]
        rows = at[0] if len(at) == 1 else None
        found[read[1]] = rows if found.get(read[1], rows) == rows else None
    return {i: dim for i, dim in found.items() if dim is not None}


def of_own_rows(expr: Expr | None, local: Collection[int]) -> Expr | None:
    """The expression where each rank has its own queries' rows of the inputs in ``local``."""
    if expr is None or expr[0] == "const" or expr[0] in INDICES:
        return expr
    if expr[0] == "at" and expr[1] in local:
        return (*expr[:2], *(ROW if e == Q else of_own_rows(e, local) for e in expr[2:]))
    head = 2 if expr[0] == "at" else 1
    return (*expr[:head], *(of_own_rows(e, local) for e in expr[head:]))


def own_rows(*exprs: Expr | None) -> frozenset[int]:
    """Captured tensors of which each rank has its own queries' rows."""
    reads = (e for expr in exprs if expr is not None for e in walk(expr) if e[0] == "at")
    return frozenset(read[1] for read in reads if ROW in read[2:])


def conjunction(*parts: Expr | None) -> Expr | None:
    """All of the given masks together; None stands for "everything is kept"."""
    kept = [p for p in parts if p is not None]
    if not kept:
        return None
    result = kept[0]
    for part in kept[1:]:
        result = ("and", result, part)
    return result


def terms(keep: Expr | None) -> tuple[Expr, ...]:
    """The masks of a conjunction, outermost "and"s taken apart; none for None."""
    if keep is None:
        return ()
    if keep[0] != "and":
        return (keep,)
    return tuple(term for part in keep[1:] for term in terms(part))


def dumps(expr: Expr | None) -> str:
    return json.dumps(expr)


def loads(text: str) -> Expr | None:
    def freeze(value: Any) -> Any:
        return tuple(freeze(v) for v in value) if isinstance(value, list) else value

    frozen: Expr | None = freeze(json.loads(text))
    return frozen
