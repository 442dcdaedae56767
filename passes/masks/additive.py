"""Additive masks as what is kept and what is added.

    term                     what it says
    where(c, x, -inf)        keep c, and add x
    where(c, x, M)           the same, where M is so far below any score that its weight is 0

The second row holds in every row of scores that keeps a key. In one that keeps none, all scores
lie around M: with a finfo.min (M <= -1e30) every score is rounded to M and the result is the mean
of all values; with a -1e9 it depends on how scores are rounded. So such a term becomes a mask where
it is certain that each row keeps a key, or where it is the only mask and M means the mean.
Otherwise it is added, as it is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ringfx.passes.masks.simplify import FALSE, TRUE, const, is_choice, leaves, simplify
from ringfx.tiles import Expr, K, Q

__all__ = ["Mask", "keeps_a_key", "split_additive"]

FAR_BELOW = -9_900.0
"""exp(M) is 0 in float64 below -745; scores of one row are taken to lie within some thousands."""
ABSORBS = -1e30
"""Adding a score to this changes nothing in float32 nor float64."""
Make: TypeAlias = Callable[..., Expr]


@dataclass(frozen=True, kw_only=True)
class Mask:
    """What an attention keeps, what it adds to scores, and what a row gives that keeps nothing."""

    keep: Expr | None = None
    bias: Expr | None = None
    fully_masked: Literal["zero", "mean"] = "zero"


@dataclass(frozen=True)
class _Term:
    """``where(keep, added, low)``; ``written`` is the term as it stands."""

    keep: Expr
    low: float
    added: Expr | None
    written: Expr


def split_additive(expr: Expr, make: Make, q_len: int, kv_len: int) -> Mask:
    """Tell apart what an additive mask removes and what it adds.

    Parameters
    ----------
    expr
        The value added to the scores.
    make
        ``Lifter.make``: normal forms within the ranges of the indices.
    """
    taken = [_peeled(term, make) for term in _summands(expr)]
    hard = [t.keep for t in taken if t.low == -math.inf]
    soft = [t for t in taken if -math.inf < t.low < 0]
    both = _all(make, *hard, *(t.keep for t in soft))
    certain = keeps_a_key(both, make, q_len, kv_len)
    mean = len(soft) == 1 and not hard and soft[0].low <= ABSORBS
    if soft and not (certain or mean):
        masks = {t.written: t.added for t in taken if t not in soft}
        return Mask(keep=_named(_all(make, *hard)), bias=_sum(expr, masks))
    return Mask(
        keep=_named(both),
        bias=_sum(expr, {t.written: t.added for t in taken}),
        fully_masked="mean" if soft and not certain else "zero",
    )


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
    head, *args = expr
    if expr == K:
        return key
    if head in ("b", "h", "q", "const"):
        return expr
    if head == "at":
        return ("at", args[0], *(_at_key(e, key, make) for e in args[1:]))
    return make(head, *(_at_key(e, key, make) for e in args))


def _summands(expr: Expr) -> list[Expr]:
    if expr[0] in ("float", "double") and expr[1][0] in ("where", "add"):
        return _summands(expr[1])
    if expr[0] != "add":
        return [expr]
    return _summands(expr[1]) + _summands(expr[2])


def _peeled(term: Expr, make: Make) -> _Term:
    """The term as a mask and the rest, by its lowest constant."""
    if term == const(0.0) or term == const(0):
        return _Term(TRUE, 0.0, None, term)
    if is_choice(term):
        low = min(float(leaf[1]) for leaf in leaves(term))
        if low <= FAR_BELOW and all(leaf[1] in (0, low) for leaf in leaves(term)):
            says = {0: TRUE, low: FALSE}
            return _Term(_selected(term, says, make), low, None, term)
        return _Term(TRUE, 0.0, term, term)
    if term[0] == "where":
        _, condition, yes, no = term
        for kept, added, low in ((condition, yes, no), (simplify("not", condition), no, yes)):
            if low[0] == "const" and float(low[1]) <= FAR_BELOW:
                return _with_rest(kept, added, float(low[1]), term, make)
    return _Term(TRUE, 0.0, term, term)


def _with_rest(kept: Expr, added: Expr, low: float, written: Expr, make: Make) -> _Term:
    """``where(kept, added, low)``, where ``added`` may be such a term itself."""
    inner = _peeled(added, make)
    if inner.low == low:
        return _Term(make("and", kept, inner.keep), low, inner.added, written)
    return _Term(kept, low, None if added == const(0.0) else added, written)


def _selected(term: Expr, kept: Mapping[float, Expr], make: Make) -> Expr:
    if term[0] == "const":
        return kept[term[1]]
    _, condition, yes, no = term
    return make("where", condition, _selected(yes, kept, make), _selected(no, kept, make))


def _all(make: Make, *keeps: Expr) -> Expr:
    found = TRUE
    for keep in keeps:
        found = make("and", found, keep)
    return found


def _named(keep: Expr) -> Expr | None:
    return None if keep == TRUE else keep


def _sum(expr: Expr, instead: Mapping[Expr, Expr | None]) -> Expr | None:
    """The sum with other summands, None for nothing, added in the order in which it is written."""
    if expr in instead:
        return instead[expr]
    if expr[0] in ("float", "double") and expr[1][0] in ("where", "add"):
        return _sum(expr[1], instead)
    if expr[0] != "add":
        return expr
    left, right = (_sum(part, instead) for part in expr[1:])
    if left is None or right is None:
        return right if left is None else left
    return simplify("add", left, right)
