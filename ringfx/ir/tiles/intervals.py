"""Interval arithmetic: bounds of an operator's result from the bounds of its operands.

Booleans are 0 and 1. Integers are exact; what floating-point arithmetic could round is UNKNOWN.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import TypeAlias

Number: TypeAlias = int | float
Interval: TypeAlias = tuple[Number, Number]

UNKNOWN: Interval = (-math.inf, math.inf)
EITHER: Interval = (0, 1)


def are_exact(*intervals: Interval) -> bool:
    """Whether arithmetic on these is exact: all ends are integers."""
    return all(isinstance(end, int) for interval in intervals for end in interval)


def add(a: Interval, b: Interval) -> Interval:
    return (a[0] + b[0], a[1] + b[1]) if are_exact(a, b) else UNKNOWN


def sub(a: Interval, b: Interval) -> Interval:
    return add(a, neg(b))


def neg(a: Interval) -> Interval:
    return -a[1], -a[0]


def mul(a: Interval, b: Interval) -> Interval:
    return _at_corners(operator.mul, a, b) if are_exact(a, b) else UNKNOWN


def floordiv(a: Interval, b: Interval) -> Interval:
    return _at_corners(operator.floordiv, a, b) if are_exact(a, b) and b[0] > 0 else UNKNOWN


def _at_corners(
    operation: Callable[[Number, Number], Number], a: Interval, b: Interval
) -> Interval:
    """Of an operation whose extremes lie where both operands are extreme."""
    values = [operation(x, y) for x in a for y in b]
    return min(values), max(values)


def truncdiv(a: Interval, b: Interval) -> Interval:
    return floordiv(a, b) if are_exact(a, b) and a[0] >= 0 else UNKNOWN


def mod(a: Interval, b: Interval) -> Interval:
    if not are_exact(a, b) or b[0] != b[1] or b[0] <= 0:
        return UNKNOWN
    if a[0] // b[0] == a[1] // b[0]:
        return a[0] % b[0], a[1] % b[0]
    return 0, b[0] - 1


def absolute(a: Interval) -> Interval:
    low = 0 if a[0] <= 0 <= a[1] else min(abs(a[0]), abs(a[1]))
    return low, max(abs(a[0]), abs(a[1]))


def minimum(a: Interval, b: Interval) -> Interval:
    return min(a[0], b[0]), min(a[1], b[1])


def maximum(a: Interval, b: Interval) -> Interval:
    return max(a[0], b[0]), max(a[1], b[1])


def integer(a: Interval) -> Interval:
    return a if are_exact(a) else UNKNOWN


def _decided(always: bool, never: bool) -> Interval:
    return (1, 1) if always else (0, 0) if never else EITHER


def le(a: Interval, b: Interval) -> Interval:
    return _decided(a[1] <= b[0], a[0] > b[1]) if are_exact(a, b) else EITHER


def lt(a: Interval, b: Interval) -> Interval:
    return _decided(a[1] < b[0], a[0] >= b[1]) if are_exact(a, b) else EITHER


def eq(a: Interval, b: Interval) -> Interval:
    if not are_exact(a, b):  # floats are compared in the wider of two types, after rounding
        return EITHER
    return _decided(a[0] == a[1] == b[0] == b[1], a[1] < b[0] or b[1] < a[0])


def ne(a: Interval, b: Interval) -> Interval:
    return logical_not(eq(a, b))


def truth(a: Interval) -> Interval:
    """Whether a number is not 0."""
    return _decided(a[0] > 0 or a[1] < 0, a[0] == a[1] == 0)


def logical_not(a: Interval) -> Interval:
    low, high = truth(a)
    return 1 - high, 1 - low


def logical_and(a: Interval, b: Interval) -> Interval:
    return minimum(truth(a), truth(b))


def logical_or(a: Interval, b: Interval) -> Interval:
    return maximum(truth(a), truth(b))


def logical_xor(a: Interval, b: Interval) -> Interval:
    return ne(truth(a), truth(b))


def where(condition: Interval, a: Interval, b: Interval) -> Interval:
    low, high = truth(condition)
    if low == high:
        return a if low else b
    return min(a[0], b[0]), max(a[1], b[1])
