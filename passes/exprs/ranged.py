"""What follows from the sizes of a sequence: comparisons that always hold, exact divisions.

``(q * 64 + k) // 64`` is q where k < 64, and ``k <= q + 4096`` is true in a sequence of 4096
tokens. Views of merged dimensions and slices of larger masks become plain positions again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ringfx.ir.tiles import Box, Expr, bounds, const
from ringfx.ir.tiles.expr import INDICES
from ringfx.ir.tiles.linear_forms import ONE, Linear, linear
from ringfx.ir.tiles.operators import COMPARISONS
from ringfx.passes.exprs.simplify import is_boolean, simplify

__all__ = ["ANYWHERE", "RANGE_RULES", "Ranges"]

ANYWHERE = Box(b=(0, 1 << 62), h=(0, 1 << 62), q=(0, 1 << 62), k=(0, 1 << 62))
"""Indices of unknown sizes: only that they are not negative."""
EXACT_FLOATS = 1 << 24
"""Integers up to here are exact in float32."""


class Ranges:
    """Normal forms over one box of indices."""

    def __init__(self, box: Box | None) -> None:
        self.box = box or ANYWHERE

    def make(self, head: str, *args: Expr) -> Expr:
        """``(head, *args)`` in normal form; the arguments already are."""
        if head in COMPARISONS:
            args = self._as_integers(*args)
        expr = self._collected(simplify(head, *args))
        rule = RANGE_RULES.get(expr[0])
        found = rule(self, *expr[1:]) if rule is not None else None
        return self._decided(expr if found is None else found)

    def ends(self, expr: Expr) -> tuple[int, int] | None:
        """Smallest and largest value of an integer expression, or None."""
        low, high = bounds(expr, self.box)
        return (low, high) if isinstance(low, int) and isinstance(high, int) else None

    def _collected(self, expr: Expr) -> Expr:
        """A sum of positions with like terms together: ``(q + 1) - 1`` is q, and so is
        ``q // 64 * 64 + q % 64``."""
        if expr[0] not in ("add", "sub") or self.ends(expr) is None:
            return expr
        terms = {e: c for e, c in linear(expr).items() if c}
        rejoined = _rejoined(terms)
        if rejoined is None and len(terms) >= _num_terms(expr):
            return expr
        return self._sum(terms if rejoined is None else rejoined)

    def _decided(self, expr: Expr) -> Expr:
        if expr[0] in ("const", "at", *INDICES):
            return expr
        ends = self.ends(expr)
        if ends is None or ends[0] != ends[1]:
            return expr
        return const(bool(ends[0]) if is_boolean(expr) else ends[0])

    def _as_integers(self, *args: Expr) -> tuple[Expr, ...]:
        """Both sides as integers, where floating-point positions hold them exactly."""
        whole = [self.integral(a) for a in args]
        if all(a[0] == "const" or w is None for a, w in zip(args, whole, strict=True)):
            return args
        return args if None in whole else tuple(w for w in whole if w is not None)

    def integral(self, expr: Expr) -> Expr | None:
        """The integer expression that equals this one exactly."""
        head, *args = expr
        found: Expr | None = None
        if head == "const":
            value = args[0]
            whole = isinstance(value, float) and value.is_integer() and abs(value) < EXACT_FLOATS
            return const(int(value)) if whole else expr if type(value) is int else None
        if head in ("float", "double", "int"):
            found = self.integral(args[0])
        elif head in ("add", "sub", "mul", "neg", "abs", "min", "max"):
            parts = [self.integral(a) for a in args]
            if None not in parts:
                found = self.make(head, *(p for p in parts if p is not None))
        elif head in (*INDICES, "floordiv", "mod"):
            found = expr
        if found is None:
            return None
        ends = self.ends(found)
        return found if ends and max(-ends[0], ends[1]) <= EXACT_FLOATS else None

    def floordiv(self, x: Expr, n: Expr) -> Expr | None:
        return self._divided(x, n)[0]

    def mod(self, x: Expr, n: Expr) -> Expr | None:
        return self._divided(x, n)[1]

    def truncdiv(self, x: Expr, n: Expr) -> Expr | None:
        ends = self.ends(x)
        if ends and ends[0] >= 0 and _size(n):
            return self.make("floordiv", x, n)
        return None

    def _divided(self, x: Expr, n: Expr) -> tuple[Expr | None, Expr | None]:
        """Quotient and remainder, where the parts of x that n does not divide stay in one cell.

        Rows of a matrix that is read one column too short are such parts as well: of 121 q + k + 61
        in rows of 122, q whole rows and k - q + 61, which is inside a row.
        """
        size = _size(n)
        if size is None or self.ends(x) is None:
            return None, None
        terms = linear(x)
        for taken in (_dividing, _nearest):
            whole = {e: taken(c, size) for e, c in terms.items()}
            rest = self._sum({e: c - whole[e] * size for e, c in terms.items()})
            ends = self.ends(rest)
            if ends is not None and ends[0] // size == ends[1] // size:
                cell = ends[0] // size
                quotient = self._sum({**whole, ONE: whole.get(ONE, 0) + cell})
                left = linear(rest)
                return quotient, self._sum({**left, ONE: left.get(ONE, 0) - cell * size})
        return None, None

    def _sum(self, terms: Linear) -> Expr:
        """The sum as it is written: what is added first, then what is taken away, then a number."""
        total = const(0)
        for part, times in sorted(terms.items(), key=lambda item: (item[0] == ONE, item[1] < 0)):
            head, number = ("add", times) if times >= 0 else ("sub", -times)
            if part == ONE:
                total = simplify(head, total, const(number))
            elif total == const(0):
                total = simplify("mul", part, const(times))
            elif times:
                total = simplify(head, total, simplify("mul", part, const(number)))
        return total

    def minimum(self, a: Expr, b: Expr) -> Expr | None:
        return self._lesser(a, b, a, b)

    def maximum(self, a: Expr, b: Expr) -> Expr | None:
        return self._lesser(a, b, b, a)

    def _lesser(self, a: Expr, b: Expr, if_a: Expr, if_b: Expr) -> Expr | None:
        left, right = self.ends(a), self.ends(b)
        if left is None or right is None:
            return None
        return if_a if left[1] <= right[0] else if_b if right[1] <= left[0] else None

    def absolute(self, a: Expr) -> Expr | None:
        ends = self.ends(a)
        if ends is None:
            return None
        return a if ends[0] >= 0 else simplify("neg", a) if ends[1] <= 0 else None


RANGE_RULES: Mapping[str, Callable[..., Expr | None]] = {
    "floordiv": Ranges.floordiv,
    "truncdiv": Ranges.truncdiv,
    "mod": Ranges.mod,
    "min": Ranges.minimum,
    "max": Ranges.maximum,
    "abs": Ranges.absolute,
}


def _dividing(times: int, size: int) -> int:
    """How often a part holds ``size``, if it does exactly."""
    return times // size if times % size == 0 else 0


def _nearest(times: int, size: int) -> int:
    """How often a part holds ``size``, about: what is left is as small as it can be."""
    return (times + size // 2) // size


def _rejoined(terms: Linear) -> Linear | None:
    """The sum with ``n * (x // n) + x % n`` written as x; None if it holds no such pair."""
    for part, times in terms.items():
        if part[0] != "mod" or _size(part[2]) is None:
            continue
        quotient = ("floordiv", *part[1:])
        if terms.get(quotient) != times * part[2][1]:
            continue
        joined = {e: c for e, c in terms.items() if e not in (part, quotient)}
        for e, c in linear(part[1]).items():
            joined[e] = joined.get(e, 0) + c * times
        left = {e: c for e, c in joined.items() if c}
        return _rejoined(left) or left
    return None


def _size(n: Expr) -> int | None:
    positive = n[0] == "const" and type(n[1]) is int and n[1] > 0
    return n[1] if positive else None


def _num_terms(expr: Expr) -> int:
    """Linear of a sum as it is written."""
    return sum(map(_num_terms, expr[1:])) if expr[0] in ("add", "sub") else 1
