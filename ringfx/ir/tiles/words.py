"""A mask as a person says it, and how much of the score matrix it keeps."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from ringfx.ir.tiles.expr import Expr, TileIndex, evaluate, inputs_used, rows_read, terms, walk
from ringfx.ir.tiles.ranges import Box, classify
from ringfx.units.format import format_bytes

__all__ = [
    "WHOLE_MASK", "density", "describe", "is_balanced", "matrices", "matrix_rows", "whole_text",
]  # fmt: skip

SAMPLED_ROWS = 64
LEAF = 65536
"""Keys evaluated at once when a row's kept keys are counted."""
WHOLE_MASK = "a mask or bias"
"""What every text about a mask with an entry for each query and key begins with."""
PARTS = 8
BALANCED_WITHIN = 1.25
"""The busiest of 8 equal parts of the rows may do 25% more than the mean: zigzag costs two kernel
calls a tile instead of one, so a smaller gain than that is none."""


def describe(keep: Expr | None, bias: Expr | None = None) -> str:
    """Words such as ``causal, window 4096, packed documents, ALiBi bias``; ``full`` for no mask.

    >>> describe(("and", ("le", ("k",), ("q",)),
    ...           ("gt", ("k",), ("sub", ("q",), ("const", 4096)))))
    'causal, window 4096'
    """
    words = [_term_words(term) for term in terms(keep)]
    if not words:
        words = ["full"]
    if bias is not None:
        words.append(_bias_words(bias))
    return ", ".join(dict.fromkeys(words))


def matrices(*exprs: Expr | None) -> tuple[int, ...]:
    """Captured tensors that are read with a query index and, in another dimension, a key index."""
    found = set()
    for read in (e for expr in exprs if expr is not None for e in walk(expr) if e[0] == "at"):
        places = [_indices(p) for p in read[2:]]
        pairs = itertools.permutations(places, 2)
        if any("q" in a and "k" in b for a, b in pairs):
            found.add(read[1])
    return tuple(sorted(found))


def matrix_rows(*exprs: Expr | None) -> Mapping[int, int]:
    """Of ``matrices`` those read at the query's own row only: position -> dim of the rows."""
    found = set(matrices(*exprs))
    return {i: dim for i, dim in rows_read(*exprs).items() if i in found}


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


def density(keep: Expr | None, q_len: int, kv_len: int) -> float:
    """Share of (query, key) pairs kept, 0 to 1; terms that read captured tensors count as kept.

    Rows are sampled (64, or all of fewer), the kept keys of each are counted exactly.
    """
    return sum(_row_counts(keep, q_len, kv_len)) / (min(q_len, SAMPLED_ROWS) * kv_len)


def is_balanced(keep: Expr | None, q_len: int, kv_len: int) -> bool:
    """Whether equal runs of queries keep about as many pairs as each other (causal ones do not)."""
    counts = _row_counts(keep, q_len, kv_len)
    parts = min(PARTS, len(counts))
    edges = [len(counts) * i // parts for i in range(parts + 1)]
    work = [sum(counts[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    return max(work) <= BALANCED_WITHIN * sum(work) / len(work)


@functools.lru_cache(maxsize=64)
def _row_counts(keep: Expr | None, q_len: int, kv_len: int) -> list[int]:
    """Kept keys of each sampled row; the layers of a model share few masks."""
    static = [term for term in terms(keep) if not inputs_used(term)]
    rows = min(q_len, SAMPLED_ROWS)
    queries = [(2 * i + 1) * q_len // (2 * rows) for i in range(rows)]
    mask: Expr | None = None
    for term in static:
        mask = term if mask is None else ("and", mask, term)
    return [_kept(mask, q, 0, kv_len) for q in queries]


def _kept(mask: Expr | None, q: int, start: int, stop: int) -> int:
    kind = classify(mask, Box(q=(q, q + 1), k=(start, stop)))
    if kind != "mixed":
        return stop - start if kind == "full" else 0
    if stop - start > LEAF:
        middle = (start + stop) // 2
        return _kept(mask, q, start, middle) + _kept(mask, q, middle, stop)
    assert mask is not None, "no mask is never mixed"
    zero = torch.zeros(1, dtype=torch.int64)
    index = TileIndex(b=zero, h=zero, q=zero + q, k=torch.arange(start, stop))
    kept = evaluate(mask, index, ()).to(torch.bool).expand(1, 1, 1, stop - start)
    return int(kept.sum())


@dataclass(frozen=True)
class _Linear:
    """q * query + k * key + constant, for a comparison's "left minus right >= 0"."""

    q: int
    k: int
    constant: int


def _linear(expr: Expr) -> _Linear | None:
    head, *args = expr
    if head == "q":
        return _Linear(1, 0, 0)
    if head == "k":
        return _Linear(0, 1, 0)
    if head == "const" and isinstance(args[0], int) and not isinstance(args[0], bool):
        return _Linear(0, 0, args[0])
    if head == "neg":
        inner = _linear(args[0])
        return None if inner is None else _Linear(-inner.q, -inner.k, -inner.constant)
    if head not in ("add", "sub"):
        return None
    left, right = _linear(args[0]), _linear(args[1])
    if left is None or right is None:
        return None
    sign = 1 if head == "add" else -1
    return _Linear(
        left.q + sign * right.q,
        left.k + sign * right.k,
        left.constant + sign * right.constant,
    )


def _at_least_zero(term: Expr) -> _Linear | None:
    """The linear form that a comparison says is >= 0 (integers, so a strict one loses 1)."""
    head, *args = term
    if head not in ("le", "lt", "ge", "gt"):
        return None
    low, high = (args[0], args[1]) if head in ("le", "lt") else (args[1], args[0])
    form = _linear(("sub", high, low))
    if form is None:
        return None
    return _Linear(form.q, form.k, form.constant - (head in ("lt", "gt")))


def _term_words(term: Expr) -> str:
    form = _at_least_zero(term)
    if form is not None:
        return _linear_words(form)
    distance = _within(term)
    if distance is not None:
        return f"within {distance} tokens"
    head, *args = term
    if head == "or":
        return " or ".join(_prefix_words(part) or _term_words(part) for part in args)
    if head == "and":
        return " and ".join(_term_words(part) for part in args)
    if head == "eq" and {_indices(a) - {"b", "h"} for a in args} == {
        frozenset("q"),
        frozenset("k"),
    }:
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


def _linear_words(form: _Linear) -> str:
    q, k, c = form.q, form.k, form.constant
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
    if head not in ("le", "lt") or args[0] != ("k",) or not inputs_used(args[1]):
        return None
    return None if _indices(args[1]) & {"q", "k"} else "prefixes of given lengths"


def _same_group_words(side: Expr) -> str:
    if side[0] in ("floordiv", "truncdiv") and side[2][0] == "const":
        return f"chunks of {side[2][1]}"
    return "packed documents" if inputs_used(side) else "groups of tokens"


def _matrix_words(term: Expr) -> str:
    indices = _indices(term)
    if not inputs_used(term):
        return "a function of positions"
    if any(_is_matrix(e) for e in walk(term)):
        return "a mask given as input"
    if any(_is_looked_up(e) for e in walk(term)):
        return "a table of positions"
    if {"q", "k"} <= indices and term[0] in _COMPARISONS and _is_relative(("sub", *term[1:])):
        return "a window of given width"
    if {"q", "k"} <= indices:
        return "query padding, key padding" if term[0] == "bool" else "a function of inputs"
    return "key padding" if "k" in indices else "query padding" if "q" in indices else "an input"


def _bias_words(bias: Expr) -> str:
    indices = _indices(bias)
    reads = [e for e in walk(bias) if e[0] == "at"]
    relative = any(_is_relative(e) for e in walk(bias))
    if not {"q", "k"} & indices:
        return "bias"
    if any(_is_matrix(e) for e in reads):
        return "bias given as input"
    if any(_is_looked_up(e) for e in reads):
        return "relative bias"
    if relative:
        return "ALiBi bias" if "h" in indices else "relative bias"
    by_token = any({"q", "k"} & _indices(e) for e in reads)
    if indices >= {"h", "k"} and "q" not in indices and not by_token:
        return "ALiBi bias"  # slope * (key - last key) says the same as slope * (key - query)
    return "key bias" if "q" not in indices else "bias"


_COMPARISONS = frozenset({"le", "lt", "ge", "gt"})


def _is_matrix(expr: Expr) -> bool:
    """Reads a tensor with an axis of queries and one of keys."""
    if expr[0] != "at":
        return False
    places = [_indices(p) & {"q", "k"} for p in expr[2:]]
    return frozenset("q") in places and frozenset("k") in places


def _is_looked_up(expr: Expr) -> bool:
    """Reads a tensor at a place computed from query and key together."""
    return expr[0] == "at" and any(_indices(p) >= {"q", "k"} for p in expr[2:])


def _is_relative(expr: Expr) -> bool:
    """Whether it is ``c * (query - key)`` and what depends on neither."""
    form = _linear(expr)
    if form is not None:
        return form.q == -form.k != 0
    if expr[0] not in ("add", "sub"):
        return False
    left, right = expr[1:]
    if _indices(right) & {"q", "k"}:
        left, right = right, left
    return not _indices(right) & {"q", "k"} and _is_relative(left)


def _indices(expr: Expr) -> frozenset[str]:
    def names() -> Iterator[str]:
        for part in walk(expr):
            if part[0] in ("b", "h", "q", "k"):
                yield part[0]

    return frozenset(names())
