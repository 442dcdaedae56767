"""Normal forms of tile functions: constants folded, comparisons of positions put one way."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

from ringfx.tiles import CAUSAL, Expr

__all__ = ["FALSE", "TRUE", "const", "simplify"]

TRUE: Expr = ("const", True)
FALSE: Expr = ("const", False)

_FOLD: Mapping[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "neg": operator.neg,
    "le": operator.le, "lt": operator.lt, "ge": operator.ge, "gt": operator.gt,
    "eq": operator.eq, "ne": operator.ne, "abs": abs, "min": min, "max": max,
    "and": lambda a, b: bool(a) and bool(b), "or": lambda a, b: bool(a) or bool(b),
    "xor": lambda a, b: bool(a) != bool(b), "not": lambda a: not a,
    "floordiv": operator.floordiv, "mod": operator.mod, "div": operator.truediv,
    "int": int, "float": float, "bool": bool, "double": float,
    "where": lambda c, a, b: a if c else b,
}  # fmt: skip

_FLIPPED = {"ge": "le", "gt": "lt"}
_NEGATED = {"le": "gt", "lt": "ge", "ge": "lt", "gt": "le", "eq": "ne", "ne": "eq"}


def const(value: Any) -> Expr:
    return ("const", value)


def simplify(head: str, *args: Expr) -> Expr:
    """The expression ``(head, *args)`` in normal form; the arguments already are."""
    if head in _FOLD and all(a[0] == "const" for a in args):
        values = [a[1] for a in args]
        divides = head in ("floordiv", "mod", "div")
        if not (divides and values[1] == 0):
            return const(_FOLD[head](*values))
    rule = _RULES.get(head)
    result = rule(*args) if rule else None
    if result is not None:
        return result
    if head in ("le", "lt", "ge", "gt"):
        return _comparison(head, *args)
    return (head, *args)


def _true(e: Expr) -> bool:
    """Whether it is the constant true; 1.0 equals True in Python and is another constant."""
    return e[0] == "const" and e[1] is True


def _false(e: Expr) -> bool:
    return e[0] == "const" and e[1] is False


def _and(a: Expr, b: Expr) -> Expr | None:
    if _false(a) or _false(b):
        return FALSE
    if _true(a) or a == b:
        return b
    if _true(b):
        return a
    return ("and", b, a) if b == CAUSAL and a != CAUSAL else None  # causal stands first


def _or(a: Expr, b: Expr) -> Expr | None:
    if _true(a) or _true(b):
        return TRUE
    if _false(a) or a == b:
        return b
    return a if _false(b) else None


def _not(a: Expr) -> Expr | None:
    if a[0] == "not":
        inner: Expr = a[1]
        return inner
    if a[0] in _NEGATED:
        return simplify(_NEGATED[a[0]], *a[1:])
    return None


def _where(c: Expr, a: Expr, b: Expr) -> Expr | None:
    if _true(c) or (a == b and type(a[-1]) is type(b[-1])):
        return a
    if _false(c):
        return b
    if _true(a) and is_boolean(b):
        return simplify("or", c, b)
    if _false(b) and is_boolean(a):
        return simplify("and", c, a)
    if _false(a) and is_boolean(b):
        return simplify("and", simplify("not", c), b)
    return None


def _add(a: Expr, b: Expr) -> Expr | None:
    if _is(a, 0):
        return b
    return a if _is(b, 0) else None


def _mul(a: Expr, b: Expr) -> Expr | None:
    if _is(a, 1):
        return b
    return a if _is(b, 1) else None


def _bool(a: Expr) -> Expr | None:
    """A cast to bool is taken inside a choice, so that tril and triu of ones become comparisons."""
    if is_boolean(a):
        return a
    if a[0] == "where":
        return simplify("where", a[1], simplify("bool", a[2]), simplify("bool", a[3]))
    return None


def _same(if_equal: Expr) -> Callable[[Expr, Expr], Expr | None]:
    return lambda a, b: if_equal if a == b else None


_RULES: Mapping[str, Callable[..., Expr | None]] = {
    "and": _and,
    "or": _or,
    "not": _not,
    "where": _where,
    "add": _add,
    "sub": lambda a, b: a if _is(b, 0) else None,
    "mul": _mul,
    "eq": _same(TRUE),
    "ne": _same(FALSE),
    "int": lambda a: a if a[0] in ("b", "h", "q", "k", "int") else None,
    "bool": lambda a: _bool(a),
    "max": lambda a, b: a if a == b else None,
    "min": lambda a, b: a if a == b else None,
}


def is_boolean(e: Expr) -> bool:
    if e[0] == "const":
        return isinstance(e[1], bool)
    return e[0] in ("and", "or", "not", "xor", "bool", *_NEGATED)


def _is(e: Expr, value: float) -> bool:
    return e[0] == "const" and not isinstance(e[1], bool) and e[1] == value


def _comparison(head: str, a: Expr, b: Expr) -> Expr:
    """Comparisons of q and k alone as ``k <= q + c`` or ``k > q - c``."""
    left, right = _affine(a), _affine(b)
    plain = (_FLIPPED[head], b, a) if head in _FLIPPED else (head, a, b)
    if left is None or right is None:
        return plain
    q, k, c = (x - y for x, y in zip(left, right, strict=True))
    if head in ("ge", "gt"):
        q, k, c, head = -q, -k, -c, _FLIPPED[head]
    if head == "lt":  # integers: x < 0 is x + 1 <= 0
        c += 1
    if (q, k) == (0, 0):
        return const(c <= 0)
    if (q, k) == (-1, 1):  # k - q + c <= 0
        return ("le", ("k",), _plus(("q",), -c))
    if (q, k) == (1, -1):  # q - k + c <= 0: k >= q + c: k > q + c - 1
        return ("gt", ("k",), _plus(("q",), c - 1))
    if (q, k) == (0, 1):
        return ("lt", ("k",), const(1 - c))
    if (q, k) == (0, -1):
        return ("ge", ("k",), const(c)) if c > 0 else TRUE  # positions are never negative
    if (q, k) == (1, 0):
        return ("lt", ("q",), const(1 - c))
    if (q, k) == (-1, 0):
        return ("ge", ("q",), const(c)) if c > 0 else TRUE
    return plain


def _plus(e: Expr, c: int) -> Expr:
    if c == 0:
        return e
    return ("add", e, const(c)) if c > 0 else ("sub", e, const(-c))


def _affine(e: Expr) -> tuple[int, int, int] | None:
    """(coefficient of q, of k, constant) of an integer expression, or None."""
    head, *args = e
    if head == "q":
        return (1, 0, 0)
    if head == "k":
        return (0, 1, 0)
    if head == "const":
        value = args[0]
        whole = isinstance(value, (int, float)) and math.isfinite(value) and value == int(value)
        return (0, 0, int(value)) if whole and not isinstance(value, bool) else None
    if head in ("add", "sub"):
        a, b = _affine(args[0]), _affine(args[1])
        if a is None or b is None:
            return None
        sign = 1 if head == "add" else -1
        return (a[0] + sign * b[0], a[1] + sign * b[1], a[2] + sign * b[2])
    if head == "neg":
        a = _affine(args[0])
        return None if a is None else (-a[0], -a[1], -a[2])
    if head == "int":
        return _affine(args[0])
    return None
