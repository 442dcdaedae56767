"""Normal forms of tile functions: constants folded, comparisons of positions put one way."""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ringfx.ir.tiles import CAUSAL, FALSE, TILE_OPS, TRUE, Expr, K, Q, const, map_children, terms
from ringfx.ir.tiles.expr import INDICES
from ringfx.ir.tiles.linear_forms import SUMS, affine
from ringfx.ir.tiles.operators import COMPARISONS

__all__ = ["NORMAL_FORMS", "assuming", "is_boolean", "is_choice", "leaves", "on_leaves", "simplify"]

MOST_LEAVES = 8
_FOLDS = {name: op.fold for name, op in TILE_OPS.items() if op.fold is not None}
_PUSHED = _FOLDS.keys() - {"where"}
_COUNTING = COMPARISONS | {"add", "sub", "mul"}
"""Where a condition stands beside numbers it is 1 or 0."""
_FLIPPED = {"ge": "le", "gt": "lt"}
_EXACT = SUMS | {"int"}
"""Operators through which positions are compared."""
_NEGATED = {"le": "gt", "lt": "ge", "ge": "lt", "gt": "le", "eq": "ne", "ne": "eq"}


def simplify(head: str, *args: Expr) -> Expr:
    """The expression ``(head, *args)`` in normal form; the arguments already are."""
    if head in _FOLDS and all(a[0] == "const" for a in args):
        folded = _folded(head, [a[1] for a in args])
        if folded is not None:
            return folded
    pushed = _into_choices(head, args)
    if pushed is not None:
        return pushed
    rule = NORMAL_FORMS.get(head)
    result = rule(*args) if rule else None
    return (head, *args) if result is None else result


def _folded(head: str, values: list[Any]) -> Expr | None:
    """The constant, unless float32 arithmetic on a tile would round it."""
    if head in ("floordiv", "mod", "div") and values[1] == 0:
        return None
    try:
        result = _FOLDS[head](*values)
        if head not in COMPARISONS and any(isinstance(v, float) for v in (*values, result)):
            narrow = _single(_FOLDS[head](*map(_single, values)))
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
    if expr[0] == "at":
        return expr
    changed = map_children(lambda e: _replaced(e, known), expr)
    return expr if changed == expr else simplify(*changed)


def _is_true(e: Expr) -> bool:
    """Whether it is the constant true; 1.0 equals True in Python and is another constant."""
    return e[0] == "const" and e[1] is True


def _is_false(e: Expr) -> bool:
    return e[0] == "const" and e[1] is False


def _simplify_and(a: Expr, b: Expr) -> Expr | None:
    if _is_false(a) or _is_false(b):
        return FALSE
    if _is_true(a) or a == b:
        return b
    if _is_true(b):
        return a
    for fact, other in ((a, b), (b, a)):
        for term in terms(fact):
            known = assuming(other, term, True)
            if known != other:
                return simplify("and", *((a, known) if other is b else (known, b)))
    return ("and", b, a) if b == CAUSAL and a != CAUSAL else None  # causal stands first


def _simplify_or(a: Expr, b: Expr) -> Expr | None:
    if _is_true(a) or _is_true(b):
        return TRUE
    if _is_false(a) or a == b:
        return b
    return a if _is_false(b) else None


def _simplify_not(a: Expr) -> Expr | None:
    if a[0] == "not":
        inner: Expr = a[1]
        return inner
    if a[0] in _NEGATED:
        return simplify(_NEGATED[a[0]], *a[1:])
    return None


def _simplify_where(c: Expr, a: Expr, b: Expr) -> Expr | None:
    if _is_true(c) or (a == b and type(a[-1]) is type(b[-1])):
        return a
    if _is_false(c):
        return b
    if _is_true(a) and is_boolean(b):
        return simplify("or", c, b)
    if _is_false(b) and is_boolean(a):
        return simplify("and", c, a)
    if _is_false(a) and is_boolean(b):
        return simplify("and", simplify("not", c), b)
    if _is_true(b) and is_boolean(a):
        return simplify("or", simplify("not", c), a)
    yes, no = assuming(a, c, True), assuming(b, c, False)
    return simplify("where", c, yes, no) if (yes, no) != (a, b) else None


def _simplify_add(a: Expr, b: Expr) -> Expr | None:
    if _is_number(a, 0):
        return b
    return a if _is_number(b, 0) else None


def _simplify_mul(a: Expr, b: Expr) -> Expr | None:
    if _is_number(a, 1):
        return b
    return a if _is_number(b, 1) else None


def _simplify_bool(a: Expr) -> Expr | None:
    """A cast to bool is taken inside a choice, so that tril and triu of ones become comparisons."""
    if is_boolean(a):
        return a
    if a[0] == "where":
        return simplify("where", a[1], simplify("bool", a[2]), simplify("bool", a[3]))
    return None


def _as_choice(one: Any, zero: Any) -> Callable[[Expr], Expr | None]:
    """A cast of a boolean to numbers is a choice."""
    return lambda a: simplify("where", a, const(one), const(zero)) if is_boolean(a) else None


def _simplify_int(a: Expr) -> Expr | None:
    return a if a[0] in (*INDICES, "int") else _as_choice(1, 0)(a)


def _if_equal(found: Expr) -> Callable[[Expr, Expr], Expr | None]:
    return lambda a, b: found if a == b else None


def is_boolean(e: Expr) -> bool:
    """Whether it is a truth value in normal form."""
    if e[0] == "const":
        return isinstance(e[1], bool)
    return e[0] in ("and", "or", "not", "xor", "bool", *COMPARISONS)


def _is_number(e: Expr, value: float) -> bool:
    return e[0] == "const" and not isinstance(e[1], bool) and e[1] == value


def _comparison(head: str, a: Expr, b: Expr) -> Expr:
    """Comparisons of q and k alone as ``k <= q + c`` or ``k > q - c``."""
    left, right = (affine(e, _EXACT) for e in (a, b))
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
        return ("le", K, _plus(Q, -c))
    if (q, k) == (1, -1):  # q - k + c <= 0: k >= q + c: k > q + c - 1
        return ("gt", K, _plus(Q, c - 1))
    if (q, k) == (0, 1):
        return ("lt", K, const(1 - c))
    if (q, k) == (0, -1):
        return ("ge", K, const(c)) if c > 0 else TRUE  # positions are never negative
    if (q, k) == (1, 0):
        return ("lt", Q, const(1 - c))
    if (q, k) == (-1, 0):
        return ("ge", Q, const(c)) if c > 0 else TRUE
    return plain


def _plus(e: Expr, c: int) -> Expr:
    if c == 0:
        return e
    return ("add", e, const(c)) if c > 0 else ("sub", e, const(-c))


NORMAL_FORMS: Mapping[str, Callable[..., Expr | None]] = {
    "and": _simplify_and,
    "or": _simplify_or,
    "not": _simplify_not,
    "where": _simplify_where,
    "add": _simplify_add,
    "sub": lambda a, b: a if _is_number(b, 0) else None,
    "mul": _simplify_mul,
    **{head: functools.partial(_comparison, head) for head in ("le", "lt", "ge", "gt")},
    "eq": _if_equal(TRUE),
    "ne": _if_equal(FALSE),
    "int": _simplify_int,
    "float": _as_choice(1.0, 0.0),
    "double": _as_choice(1.0, 0.0),
    "bool": _simplify_bool,
    "max": lambda a, b: a if a == b else None,
    "min": lambda a, b: a if a == b else None,
}
