"""Normal forms of tile functions: constants folded, comparisons of positions put one way."""

from __future__ import annotations

import math
import operator
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ringfx.ir.tiles import CAUSAL, Expr, terms

__all__ = [
    "COMPARISONS",
    "FALSE",
    "TRUE",
    "const",
    "is_boolean",
    "is_choice",
    "leaves",
    "on_leaves",
    "simplify",
]

TRUE: Expr = ("const", True)
FALSE: Expr = ("const", False)

COMPARISONS = frozenset({"le", "lt", "ge", "gt", "eq", "ne"})
MOST_LEAVES = 8

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

_PUSHED = frozenset(_FOLD) - {"where"}
_COUNTING = COMPARISONS | {"add", "sub", "mul"}
"""Where a condition stands beside numbers it is 1 or 0."""
_FLIPPED = {"ge": "le", "gt": "lt"}
_NEGATED = {"le": "gt", "lt": "ge", "ge": "lt", "gt": "le", "eq": "ne", "ne": "eq"}


def const(value: Any) -> Expr:
    return ("const", value)


def simplify(head: str, *args: Expr) -> Expr:
    """The expression ``(head, *args)`` in normal form; the arguments already are."""
    if head in _FOLD and all(a[0] == "const" for a in args):
        folded = _folded(head, [a[1] for a in args])
        if folded is not None:
            return folded
    pushed = _into_choices(head, args)
    if pushed is not None:
        return pushed
    rule = _RULES.get(head)
    result = rule(*args) if rule else None
    if result is not None:
        return result
    if head in ("le", "lt", "ge", "gt"):
        return _comparison(head, *args)
    return (head, *args)


def _folded(head: str, values: list[Any]) -> Expr | None:
    """The constant, unless float32 arithmetic on a tile would round it."""
    if head in ("floordiv", "mod", "div") and values[1] == 0:
        return None
    try:
        result = _FOLD[head](*values)
        if head not in COMPARISONS and any(isinstance(v, float) for v in (*values, result)):
            narrow = _single(_FOLD[head](*map(_single, values)))
            if not (result == narrow or (result != result and narrow != narrow)):
                return None
    except (OverflowError, ValueError):
        return None
    return const(result)


def _single(value: Any) -> Any:
    """The nearest float32; what float32 cannot hold at all belongs to float64."""
    if not isinstance(value, float):
        return value
    try:
        return struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return value


def is_choice(e: Expr) -> bool:
    """Whether it is a constant, or chosen among constants."""
    return e[0] == "const" or (e[0] == "where" and is_choice(e[2]) and is_choice(e[3]))


def leaves(e: Expr) -> tuple[Expr, ...]:
    """The constants that a choice chooses among."""
    return (e,) if e[0] == "const" else (*leaves(e[2]), *leaves(e[3]))


def on_leaves(change: Callable[[Expr], Expr], e: Expr) -> Expr:
    """The choice among changed constants."""
    if e[0] == "const":
        return change(e)
    return simplify("where", e[1], on_leaves(change, e[2]), on_leaves(change, e[3]))


def _into_choices(head: str, args: Sequence[Expr]) -> Expr | None:
    """An operator on choices among constants is a choice: ``(1 - where(c, 1, 0)) * -1e9``."""
    if head not in _PUSHED or all(a[0] == "const" for a in args):
        return None
    if head in _COUNTING and any(map(is_choice, args)):
        args = [_counted(a) for a in args]
    if not all(map(is_choice, args)):
        return None
    if math.prod(len(leaves(a)) for a in args) > MOST_LEAVES:
        return None
    at = next(i for i, a in enumerate(args) if a[0] == "where")
    _, condition, yes, no = args[at]
    parts = [simplify(head, *args[:at], part, *args[at + 1 :]) for part in (yes, no)]
    if not all(map(is_choice, parts)):
        return None
    return simplify("where", condition, *parts)


def _counted(e: Expr) -> Expr:
    """A condition as the number that it is."""
    return ("where", e, const(1), const(0)) if is_boolean(e) and e[0] != "const" else e


def assuming(expr: Expr, fact: Expr, truth: bool) -> Expr:
    """The expression where a condition is known to hold, or not to."""
    known = {fact: const(truth), simplify("not", fact): const(not truth)}
    return _replaced(expr, {e: value for e, value in known.items() if e[0] != "const"})


def _replaced(expr: Expr, known: Mapping[Expr, Expr]) -> Expr:
    if expr in known:
        return known[expr]
    if expr[0] == "at" or not any(isinstance(part, tuple) for part in expr[1:]):
        return expr
    parts = tuple(_replaced(part, known) for part in expr[1:])
    return expr if parts == expr[1:] else simplify(expr[0], *parts)


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
    for fact, other in ((a, b), (b, a)):
        for term in terms(fact):
            known = assuming(other, term, True)
            if known != other:
                return simplify("and", *((a, known) if other is b else (known, b)))
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
    if _true(b) and is_boolean(a):
        return simplify("or", simplify("not", c), a)
    yes, no = assuming(a, c, True), assuming(b, c, False)
    return simplify("where", c, yes, no) if (yes, no) != (a, b) else None


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


def _number(one: Any, zero: Any) -> Callable[[Expr], Expr | None]:
    """A cast of a boolean to numbers is a choice."""
    return lambda a: simplify("where", a, const(one), const(zero)) if is_boolean(a) else None


def _int(a: Expr) -> Expr | None:
    return a if a[0] in ("b", "h", "q", "k", "int") else _number(1, 0)(a)


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
    "int": _int,
    "float": _number(1.0, 0.0),
    "double": _number(1.0, 0.0),
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
