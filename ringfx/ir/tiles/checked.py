"""Tile functions that come from outside: their form is checked before anything walks them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ringfx.ir.tiles.evaluation import TileIndex, evaluate
from ringfx.ir.tiles.expr import INDICES, SCORE, Expr, inputs_used, terms, walk
from ringfx.ir.tiles.operators import TILE_OPS
from ringfx.ir.tiles.ranges import Box, bounds

__all__ = ["MAX_DEPTH", "checked_expr", "checked_score_map", "undefined"]

MAX_DEPTH = 150
"""Levels of the deepest expression; those of real models have 30. Walks are recursive."""
MAX_PARTS = 20_000
MAX_INPUTS = 4096
MAX_NUMBER = 2**63
MAX_POWER = 1024
"""The largest power of two numbers: beyond, it would be computed for ever."""


def checked_expr(value: object) -> Expr:
    """The expression that nested lists or tuples stand for.

    Raises
    ------
    ValueError
        An operator is unknown, has too few or too many operands, or the nesting is too deep.
    """
    found = checked_score_map(value)
    if any(part == SCORE for part in walk(found)):
        raise ValueError("a mask or bias of an attention cannot read its scores")
    return found


def checked_score_map(value: object) -> Expr:
    """The same of a score map, which may read scores."""
    budget = [MAX_PARTS]
    return _checked(value, 0, budget)


def _checked(value: object, depth: int, budget: list[int]) -> Expr:
    budget[0] -= 1
    if depth > MAX_DEPTH or budget[0] < 0:
        raise ValueError("a tile function is nested too deeply or has too many parts")
    if not isinstance(value, list | tuple) or not value or not isinstance(value[0], str):
        raise ValueError(
            f"a tile function must be a list that begins with a name; got {value!r:.60}"
        )
    head, args = value[0], value[1:]
    if head in (*INDICES, "score"):
        return _of_length(head, args, 0)
    if head == "const":
        return _constant(_of_length(head, args, 1))
    if head == "at":
        places = (_checked(part, depth + 1, budget) for part in args[1:])
        return ("at", _input(args), *places)
    if head not in TILE_OPS:
        raise ValueError(f"a tile function has no operator {head!r:.60}")
    _of_length(head, args, TILE_OPS[head].arity)
    found: Expr = (head, *(_checked(part, depth + 1, budget) for part in args))
    return _bounded_power(found) if head == "pow" else found


def _of_length(head: str, args: Any, count: int) -> Expr:
    if len(args) != count:
        raise ValueError(f"{head!r} of a tile function takes {count} operands; got {len(args)}")
    return (head, *args)


def _constant(expr: Expr) -> Expr:
    """A number may be infinite, as a bias that hides a key is, but not NaN."""
    number = expr[1]
    if not isinstance(number, int | float) or number != number:
        raise ValueError(f"a constant of a tile function must be a number; got {number!r:.60}")
    if isinstance(number, int) and abs(number) > MAX_NUMBER:
        raise ValueError("a constant of a tile function has more than 64 bits")
    return expr


def _input(args: Any) -> int:
    """The number of the captured tensor that is read."""
    number = args[0] if args else None
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < MAX_INPUTS:
        raise ValueError(
            f"'at' of a tile function needs the number of an input; got {number!r:.60}"
        )
    return number


def _bounded_power(expr: Expr) -> Expr:
    if any(part[0] in ("at", "score", *INDICES) for part in walk(expr)):
        return expr
    power = expr[2][1] if expr[2][0] == "const" else math.inf
    if expr[1][0] != "const" or abs(power) > MAX_POWER:
        raise ValueError("'pow' of a tile function has an endless constant")
    return expr


def undefined(expr: Expr | None, q_len: int, kv_len: int) -> str | None:
    """Why the expression has no value at some positions, as far as that follows from positions."""
    for term in terms(expr):
        found = _divides_by_zero(term, q_len, kv_len) or _fails(term, q_len, kv_len)
        if found is not None:
            return found
    return None


_DIVISIONS = frozenset({"floordiv", "truncdiv", "mod", "fmod"})


def _divides_by_zero(term: Expr, q_len: int, kv_len: int) -> str | None:
    box = Box(q=(0, q_len), k=(0, kv_len))
    for part in walk(term):
        if part[0] in _DIVISIONS:
            low, high = bounds(part[2], box)
            if isinstance(low, int) and isinstance(high, int) and low <= 0 <= high:
                return f"{part[0]!r} of a tile function divides by 0"
    return None


def _fails(term: Expr, q_len: int, kv_len: int) -> str | None:
    """A trial at the first and last positions of what reads no tensor."""
    if inputs_used(term):
        return None
    zero = torch.zeros(1, dtype=torch.int64)
    index = TileIndex(
        b=zero, h=zero, q=torch.tensor([0, q_len - 1]), k=torch.tensor([0, kv_len - 1]), row=zero
    )
    return _raised(lambda: evaluate(term, index, ()))


def _raised(call: Callable[[], object]) -> str | None:
    try:
        call()
    # What Python's and torch's arithmetic raise for operands of kinds that do not go together.
    except (ArithmeticError, TypeError, ValueError, RuntimeError, IndexError) as error:
        return f"a tile function cannot be computed: {str(error).splitlines()[0]:.100}"
    return None
