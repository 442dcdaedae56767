"""A mask as a person says it."""

from __future__ import annotations

from ringfx.ir.tiles.expr import Expr, K, indices_used, inputs_used, reads, terms, walk
from ringfx.ir.tiles.linear_forms import affine
from ringfx.units.format import format_bytes

__all__ = ["WHOLE_MASK", "describe", "whole_text"]

WHOLE_MASK = "a mask or bias"
"""What every text about a mask with an entry for each query and key begins with."""
_ORDERED = frozenset({"le", "lt", "ge", "gt"})
_OPPOSITE = {"le": "gt", "lt": "ge", "ge": "lt", "gt": "le"}


def describe(keep: Expr | None, bias: Expr | None = None, score_map: Expr | None = None) -> str:
    """Words such as ``causal, window 4096, packed documents, ALiBi bias``; ``full`` for no mask.

    >>> describe(("and", ("le", ("k",), ("q",)),
    ...           ("gt", ("k",), ("sub", ("q",), ("const", 4096)))))
    'causal, window 4096'
    """
    words = [_term_words(term) for term in terms(_not_inside(keep))]
    if not words:
        words = ["full"]
    if bias is not None:
        words.append(_bias_words(bias))
    if score_map is not None:
        words.append("score map")
    return ", ".join(dict.fromkeys(words))


def whole_text(given: int, made: int = 0, taken: int = 0, ranks: int | None = None) -> str:
    """Of masks and biases that are no function of positions.

    Parameters
    ----------
    given, made
        Bytes of those that are inputs, and of those that are computed.
    taken
        Bytes of those of which a rank takes its own queries' rows.
    ranks
        None where they are not known.

    >>> whole_text(2**21, taken=2**21, ranks=4)
    'a mask or bias given whole, 2.00 MiB: each rank takes the rows of its own queries, 512 KiB'
    """
    size = given + made
    text = f"{WHOLE_MASK} {'given' if given else 'computed'} whole, {format_bytes(size)}"
    if ranks == 1:
        return text
    if taken and ranks is not None:
        text += f": each rank takes the rows of its own queries, {format_bytes(taken // ranks)}"
    elif taken:
        text += ": of several ranks each takes the rows of its own queries"
    if size > taken:
        text += f"{';' if taken else ':'} {format_bytes(size - taken)} on every rank, not split"
    return text


def _not_inside(term: Expr | None, negated: bool = False) -> Expr | None:
    """The same mask as terms that must all hold, none of them a ``not`` of a comparison.

    A mask is often written as what it hides: ``(distance < 0) | (distance >= 64)``.
    """
    if term is None:
        return None
    head, *args = term
    if head == "not":
        return _not_inside(args[0], not negated)
    if head == ("or" if negated else "and"):
        return ("and", *(_not_inside(arg, negated) for arg in args))
    if not negated:
        return term
    if head == "and":
        parts = [_not_inside(arg, negated) for arg in args]
        return ("not", term) if any(x is None or x[0] == "not" for x in parts) else ("or", *parts)
    return (_OPPOSITE[head], *args) if head in _OPPOSITE else ("not", term)


def _at_least_zero(term: Expr) -> tuple[int, int, int] | None:
    """What a comparison says is >= 0: coefficients of query and key, constant.

    Of integers, so that a strict comparison takes 1 away.
    """
    head, *args = term
    if head not in _ORDERED:
        return None
    low, high = args if head in ("le", "lt") else args[::-1]
    form = affine(("sub", high, low))
    return None if form is None else (*form[:2], form[2] - (head in ("lt", "gt")))


def _term_words(term: Expr) -> str:
    form = _at_least_zero(term)
    if form is not None:
        return _linear_words(*form)
    distance = _within(term)
    if distance is not None:
        return f"within {distance} tokens"
    head, *args = term
    if head == "or":
        return " or ".join(_prefix_words(part) or _term_words(part) for part in args)
    if head == "and":
        return " and ".join(_term_words(part) for part in args)
    if head == "eq" and {_tokens(a) for a in args} == {frozenset("q"), frozenset("k")}:
        return _same_group_words(args[0])
    if head == "not" and args[0][0] not in ("at", "bool"):
        return f"not ({_term_words(args[0])})"
    return _matrix_words(term)


def _within(term: Expr) -> int | None:
    """The distance of a band on both sides: abs(q - k) <= distance."""
    if term[0] not in ("le", "lt") or term[1][0] != "abs":
        return None
    if term[2][0] != "const" or not _is_relative(term[1][1]):
        return None
    distance: int = term[2][1] - (term[0] == "lt")
    return distance


def _linear_words(q: int, k: int, c: int) -> str:
    if (q, k) == (1, -1):  # key <= query + c
        return "causal" if c == 0 else f"causal shifted by {c}"
    if (q, k) == (-1, 1):  # key >= query - c
        return f"window {c + 1}" if c > 0 else f"keys from query {-c:+d}"
    if (q, k) == (0, -1):
        return f"first {c + 1} keys"
    if (q, k) == (0, 1):
        return f"keys from {-c}"
    return "some queries" if k == 0 else "a linear mask"


def _prefix_words(term: Expr) -> str | None:
    """Keys below a length that the inputs give."""
    head, *args = term
    if head not in ("le", "lt") or args[0] != K or not inputs_used(args[1]):
        return None
    return None if _tokens(args[1]) else "prefixes of given lengths"


def _same_group_words(side: Expr) -> str:
    if side[0] in ("floordiv", "truncdiv") and side[2][0] == "const":
        return f"chunks of {side[2][1]}"
    return "packed documents" if inputs_used(side) else "groups of tokens"


def _matrix_words(term: Expr) -> str:
    indices = indices_used(term)
    if not inputs_used(term):
        return "a function of positions"
    if any(_is_matrix(e) for e in walk(term)):
        return "a mask given as input"
    if any(_is_looked_up(e) for e in walk(term)):
        return "a table of positions"
    if {"q", "k"} <= indices and term[0] in _ORDERED and _is_relative(("sub", *term[1:])):
        return "a window of given width"
    if {"q", "k"} <= indices:
        return "query padding, key padding" if term[0] == "bool" else "a function of inputs"
    return "key padding" if "k" in indices else "query padding" if "q" in indices else "an input"


def _bias_words(bias: Expr) -> str:
    indices = indices_used(bias)
    found = list(reads(bias))
    relative = any(_is_relative(e) for e in walk(bias))
    if not _tokens(bias):
        return "bias"
    if any(_is_matrix(e) for e in found):
        return "bias given as input"
    if any(_is_looked_up(e) for e in found):
        return "relative bias"
    if relative:
        return "ALiBi bias" if "h" in indices else "relative bias"
    by_token = any(_tokens(e) for e in found)
    if indices >= {"h", "k"} and "q" not in indices and not by_token:
        return "ALiBi bias"  # slope * (key - last key) says the same as slope * (key - query)
    return "key bias" if "q" not in indices else "bias"


def _is_matrix(expr: Expr) -> bool:
    """Reads a tensor with an axis of queries and one of keys."""
    if expr[0] != "at":
        return False
    places = [_tokens(p) for p in expr[2:]]
    return frozenset("q") in places and frozenset("k") in places


def _is_looked_up(expr: Expr) -> bool:
    """Reads a tensor at a place computed from query and key together."""
    return expr[0] == "at" and any(_tokens(p) == {"q", "k"} for p in expr[2:])


def _is_relative(expr: Expr) -> bool:
    """Whether it is ``c * (query - key)`` and what depends on neither."""
    form = affine(expr)
    if form is not None:
        return form[0] == -form[1] != 0
    if expr[0] not in ("add", "sub"):
        return False
    left, right = expr[1:]
    if _tokens(right):
        left, right = right, left
    return not _tokens(right) and _is_relative(left)


def _tokens(expr: Expr) -> frozenset[str]:
    """Whether it depends on the query ("q"), the key ("k"), or both."""
    return indices_used(expr) & {"q", "k"}
