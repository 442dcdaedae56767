"""Tile functions: masks and biases of attention as functions of global indices.

A score matrix of S x S entries is never stored. What a model says about it (causal, window, packed
documents, padding, ALiBi, relative buckets, a matrix given as input) is an expression over four
index variables and a few captured tensors, evaluated on one tile at a time with that tile's global
positions. The expression is a nested tuple of plain values, so that it can be compared, hashed,
printed, written as JSON and sent as the argument of an operator:

    ("b",) ("h",) ("q",) ("k",)      index of batch, head, query token, key token
    ("const", 3)                     a number
    ("at", i, e0, e1, ...)           inputs[i][e0, e1, ...]
    (name, e0, ...)                  a row of TILE_OPS

    causal, window of 4096           ("and", ("le", k, q), ("gt", k, ("sub", q, ("const", 4096))))
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

__all__ = [
    "CAUSAL",
    "TILE_OPS",
    "Expr",
    "TileIndex",
    "conjunction",
    "dumps",
    "evaluate",
    "inputs_used",
    "loads",
    "terms",
    "walk",
]

Expr: TypeAlias = tuple[Any, ...]

B: Expr = ("b",)
H: Expr = ("h",)
Q: Expr = ("q",)
K: Expr = ("k",)
CAUSAL: Expr = ("le", K, Q)
LEAVES = frozenset({"b", "h", "q", "k", "const", "at"})

TILE_OPS: Mapping[str, Callable[..., torch.Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.true_divide,
    "floordiv": torch.floor_divide,
    "truncdiv": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
    "mod": torch.remainder,
    "neg": torch.neg,
    "abs": torch.abs,
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "tanh": torch.tanh,
    "min": torch.minimum,
    "max": torch.maximum,
    "pow": torch.pow,
    "le": torch.le,
    "lt": torch.lt,
    "ge": torch.ge,
    "gt": torch.gt,
    "eq": torch.eq,
    "ne": torch.ne,
    "and": torch.logical_and,
    "or": torch.logical_or,
    "xor": torch.logical_xor,
    "not": torch.logical_not,
    "where": torch.where,
    "int": lambda a: a.to(torch.int64),
    "float": lambda a: a.to(torch.float32),
    "double": lambda a: a.to(torch.float64),
    "half": lambda a: a.to(torch.float16),
    "bfloat16": lambda a: a.to(torch.bfloat16),
    "bool": lambda a: a.to(torch.bool),
}


@dataclass(frozen=True, eq=False)
class TileIndex:
    """Global indices of one tile: int64 vectors of batch, head, query and key."""

    b: torch.Tensor
    h: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor

    def broadcast(self, name: str) -> torch.Tensor:
        """The named vector shaped to broadcast over [B, H, Q, K]."""
        shape = [1, 1, 1, 1]
        shape["bhqk".index(name)] = -1
        vector: torch.Tensor = getattr(self, name)
        return vector.view(shape)


def evaluate(expr: Expr, index: TileIndex, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """The expression's values on one tile, broadcastable to [B, H, Q, K]."""
    head, *args = expr
    if head in ("b", "h", "q", "k"):
        return index.broadcast(head)
    if head == "const":
        return torch.as_tensor(args[0], device=index.q.device)
    if head == "at":
        places = [evaluate(e, index, inputs) for e in args[1:]]
        return inputs[args[0]][tuple(places)]
    return TILE_OPS[head](*(evaluate(e, index, inputs) for e in args))


def walk(expr: Expr) -> Iterator[Expr]:
    """The expression and everything inside it, outermost first."""
    yield expr
    if expr[0] in ("b", "h", "q", "k", "const"):
        return
    for part in expr[2:] if expr[0] == "at" else expr[1:]:
        yield from walk(part)


def inputs_used(expr: Expr | None) -> tuple[int, ...]:
    """Positions of the captured tensors that the expression reads, ascending."""
    if expr is None:
        return ()
    return tuple(sorted({e[1] for e in walk(expr) if e[0] == "at"}))


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
