"""Terms of additive masks as what is kept and what is added.

    term                     what it says
    where(c, x, -inf)        keep c, and add x
    where(c, x, M)           the same, where M is so far below any score that its weight is 0

The second row holds in every row of scores that keeps a key. In one that keeps none, all scores
lie around M: with a finfo.min (M <= -1e30) every score is rounded to M and the result is the mean
of all values; with a -1e9 it depends on how scores are rounded. So such a term becomes a mask where
it is certain that each row keeps a key, or where M means the mean (see decompose.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from ringfx.ir.tiles import FALSE, TRUE, Expr, K, Q, const, map_children
from ringfx.passes.exprs.simplify import is_choice, leaves, on_leaves, simplify

__all__ = ["ABSORBS", "FAR_BELOW", "Make", "Term", "keeps_a_key", "peeled", "summands", "total"]

FAR_BELOW = -9_900.0
"""exp(M) is 0 in float64 below -745; scores of one row are taken to lie within some thousands."""
ABSORBS = -1e30
"""Adding a score to this changes nothing in float32 nor float64."""
Make: TypeAlias = Callable[..., Expr]


@dataclass(frozen=True)
class Term:
    """``where(keep, added, low)``; ``written`` is the term as it stands."""

    keep: Expr
    low: float
    added: Expr | None
    written: Expr


def keeps_a_key(keep: Expr, make: Make, q_len: int, kv_len: int) -> bool:
    """Whether it follows from positions alone that every query attends some key.

    Its own position, the same one counted from the end, or the first.
    """
    ends_together = make("add", Q, const(kv_len - q_len))
    tried = [
        const(0),
        *([Q] if q_len <= kv_len else []),
        *([ends_together] if q_len <= kv_len else []),
    ]
    return keep == TRUE or any(_at_key(keep, key, make) == TRUE for key in tried)


def _at_key(expr: Expr, key: Expr, make: Make) -> Expr:
    """The expression where the key index is this one."""
    return key if expr == K else map_children(lambda e: _at_key(e, key, make), expr, make)


def summands(expr: Expr) -> list[Expr]:
    if expr[0] in ("float", "double") and expr[1][0] in ("where", "add"):
        return summands(expr[1])
    if expr[0] != "add":
        return [expr]
    return summands(expr[1]) + summands(expr[2])


def peeled(term: Expr, make: Make) -> Term:
    """The term as a mask and the rest, by its lowest constant."""
    if term == const(0.0) or term == const(0):
        return Term(TRUE, 0.0, None, term)
    if is_choice(term):
        low = min(float(leaf[1]) for leaf in leaves(term))
        others = {leaf[1] for leaf in leaves(term)} - {low}
        if low <= ABSORBS or (low <= FAR_BELOW and others <= {0}):
            says = dict.fromkeys(others, TRUE) | {low: FALSE}
            rest = on_leaves(lambda leaf: const(0.0) if leaf[1] == low else leaf, term)
            return Term(_selected(term, says, make), low, rest if others - {0} else None, term)
        return Term(TRUE, 0.0, term, term)
    if term[0] == "where":
        _, condition, yes, no = term
        for kept, added, low in ((condition, yes, no), (simplify("not", condition), no, yes)):
            if low[0] == "const" and float(low[1]) <= FAR_BELOW:
                return _with_rest(kept, added, float(low[1]), term, make)
    return Term(TRUE, 0.0, term, term)


def _with_rest(kept: Expr, added: Expr, low: float, written: Expr, make: Make) -> Term:
    """``where(kept, added, low)``, where ``added`` may be such a term itself."""
    inner = peeled(added, make)
    if inner.low == low:
        return Term(make("and", kept, inner.keep), low, inner.added, written)
    return Term(kept, low, None if added == const(0.0) else added, written)


def _selected(term: Expr, kept: Mapping[float, Expr], make: Make) -> Expr:
    if term[0] == "const":
        return kept[term[1]]
    _, condition, yes, no = term
    return make("where", condition, _selected(yes, kept, make), _selected(no, kept, make))


def total(expr: Expr, instead: Mapping[Expr, Expr | None]) -> Expr | None:
    """The sum with other summands, None for nothing, added in the order in which it is written."""
    if expr in instead:
        return instead[expr]
    if expr[0] in ("float", "double") and expr[1][0] in ("where", "add"):
        return total(expr[1], instead)
    if expr[0] != "add":
        return expr
    left, right = (total(part, instead) for part in expr[1:])
    if left is None or right is None:
        return right if left is None else left
    return simplify("add", left, right)
