"""Sums of parts with integer coefficients: the one reader of linear forms."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeAlias

from ringfx.ir.tiles.expr import Expr, K, Q, const, walk

__all__ = ["ONE", "SUMS", "Linear", "affine", "linear"]

Linear: TypeAlias = Mapping[Expr, int]
"""A sum: the coefficient of each of its parts; that of ``ONE`` is its constant."""
ONE: Expr = const(1)
SUMS = frozenset({"add", "sub", "neg"})


def linear(expr: Expr, through: Collection[str] = SUMS | {"mul"}) -> Linear:
    """The parts of an integer expression with their coefficients.

    Parameters
    ----------
    through
        The operators that are read; the result of any other is a part. "int" means that numbers
        such as 2.0 are integers as well.

    >>> linear(("sub", ("mul", ("q",), ("const", 2)), ("const", 3)))
    {('q',): 2, ('const', 1): -3}
    """
    head, *args = expr
    if head == "const" and _is_integer(args[0], "int" in through):
        return {ONE: int(args[0])}
    if head not in through:
        return {expr: 1}
    if head == "int":
        return linear(args[0], through)
    if head == "neg":
        return _scaled(linear(args[0], through), -1)
    if head == "mul":
        for number, other in (args, args[::-1]):
            if number[0] == "const" and _is_integer(number[1]):
                return _scaled(linear(other, through), number[1])
        return {expr: 1}
    left, right = (linear(e, through) for e in args)
    return _sum(left, right if head == "add" else _scaled(right, -1))


def _sum(a: Linear, b: Linear) -> Linear:
    return {**a, **{e: a.get(e, 0) + c for e, c in b.items()}}


def _scaled(form: Linear, times: int) -> Linear:
    return {e: c * times for e, c in form.items()}


def _is_integer(value: Any, or_float: bool = False) -> bool:
    return type(value) is int or (or_float and isinstance(value, float) and value.is_integer())


def affine(expr: Expr, through: Collection[str] = SUMS) -> tuple[int, int, int] | None:
    """(coefficient of q, of k, constant); None where the expression has other parts."""
    found = linear(expr, through)
    if not found.keys() <= {Q, K, ONE}:
        return None
    numbers = (e[1] for e in walk(expr) if e[0] == "const")
    if not all(_is_integer(n, "int" in through) for n in numbers):  # 1.0 equals 1 in Python
        return None
    return found.get(Q, 0), found.get(K, 0), found.get(ONE, 0)
