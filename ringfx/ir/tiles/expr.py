"""Tile functions: masks and biases of attention as functions of global indices.

A score matrix of S x S entries is never stored. What a model says about it (causal, window, packed
documents, padding, ALiBi, relative buckets, a matrix given as input) is an expression over four
index variables and a few captured tensors, evaluated on one tile at a time with that tile's global
positions. The expression is a nested tuple of plain values, so that it can be compared, hashed,
printed, written as JSON and sent as the argument of an operator:

    ("b",) ("h",) ("q",) ("k",)      index of batch, head, query token, key token
    ("row",)                         place of the query among this rank's own
    ("score",)                       scale * q k^T, in a score map alone
    ("const", 3)                     a number
    ("at", i, e0, e1, ...)           inputs[i][e0, e1, ...]
    (name, e0, ...)                  a row of TILE_OPS

    causal, window of 4096           ("and", ("le", k, q), ("gt", k, ("sub", q, ("const", 4096))))

Only ``children`` and ``map_children`` know which parts of a tuple are expressions; whatever walks
or rewrites expressions is written with them.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeAlias

__all__ = [
    "CAUSAL", "FALSE", "INDICES", "SCORE", "TRUE", "B", "Expr", "H", "K", "Q", "children",
    "conjunction", "const", "depth", "dumps", "indices_used", "inputs_used", "loads",
    "map_children", "of_own_rows", "own_rows", "reads", "rows_read", "terms", "walk",
]  # fmt: skip

Expr: TypeAlias = tuple[Any, ...]

INDICES = ("b", "h", "q", "k", "row")
B: Expr = ("b",)
H: Expr = ("h",)
Q: Expr = ("q",)
K: Expr = ("k",)
ROW: Expr = ("row",)
SCORE: Expr = ("score",)
CAUSAL: Expr = ("le", K, Q)
TRUE: Expr = ("const", True)
FALSE: Expr = ("const", False)


def const(value: Any) -> Expr:
    """A number or a truth value as an expression."""
    return ("const", value)


def _plain(head: str, *args: Expr) -> Expr:
    return (head, *args)


def children(expr: Expr) -> tuple[Expr, ...]:
    """The expressions that an expression is made of; none for an index or a constant."""
    if expr[0] == "const":
        return ()
    return expr[2:] if expr[0] == "at" else expr[1:]


def map_children(
    change: Callable[[Expr], Expr], expr: Expr, make: Callable[..., Expr] = _plain
) -> Expr:
    """The expression with each of its children changed.

    Parameters
    ----------
    make
        Puts an operator and its new operands together, in a normal form for example.
    """
    parts = children(expr)
    if not parts:
        return expr
    changed = map(change, parts)
    return ("at", expr[1], *changed) if expr[0] == "at" else make(expr[0], *changed)


def walk(expr: Expr) -> Iterator[Expr]:
    """The expression and everything inside it, outermost first."""
    yield expr
    for part in children(expr):
        yield from walk(part)


def depth(expr: Expr) -> int:
    """How many parts stand inside each other."""
    deepest, level = 0, [expr]
    while level:
        deepest += 1
        level = [part for e in level for part in children(e)]
    return deepest


def reads(*exprs: Expr | None) -> Iterator[Expr]:
    """Every ``("at", ...)`` inside the expressions."""
    return (e for expr in exprs if expr is not None for e in walk(expr) if e[0] == "at")


def inputs_used(*exprs: Expr | None) -> tuple[int, ...]:
    """Positions of the captured tensors that the expressions read, ascending."""
    return tuple(sorted({read[1] for read in reads(*exprs)}))


def indices_used(*exprs: Expr) -> frozenset[str]:
    """Which of the global indices "b", "h", "q" and "k" the expressions depend on."""
    return frozenset("bhqk") & {part[0] for expr in exprs for part in walk(expr)}


def rows_read(*exprs: Expr | None) -> Mapping[int, int]:
    """Captured tensors that are read at the query's own row only: position -> dim of the rows."""
    found: dict[int, int | None] = {}
    for read in reads(*exprs):
        at = [d for d, place in enumerate(read[2:]) if place == Q]
        rows = at[0] if len(at) == 1 else None
        found[read[1]] = rows if found.get(read[1], rows) == rows else None
    return {i: dim for i, dim in found.items() if dim is not None}


def of_own_rows(expr: Expr | None, local: Collection[int]) -> Expr | None:
    """The expression where each rank has its own queries' rows of the inputs in ``local``."""

    def moved(e: Expr) -> Expr:
        is_local = e[0] == "at" and e[1] in local
        return map_children(lambda part: ROW if is_local and part == Q else moved(part), e)

    return None if expr is None else moved(expr)


def own_rows(*exprs: Expr | None) -> frozenset[int]:
    """Captured tensors of which each rank has its own queries' rows."""
    return frozenset(read[1] for read in reads(*exprs) if ROW in read[2:])


def conjunction(*parts: Expr | None) -> Expr | None:
    """All of the given masks together; None stands for "everything is kept"."""
    kept = [p for p in parts if p is not None]
    return functools.reduce(lambda a, b: ("and", a, b), kept) if kept else None


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
