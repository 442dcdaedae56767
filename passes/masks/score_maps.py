"""Functions of each score by itself, where no scale, cap or mask says what is done to it.

A trained cap, a power, a gate, scores times a number for each pair of tokens: elementwise calls are
kept as an expression of ``SCORE`` and evaluated tile by tile. What hides a key is never inside: a
softmax must know it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ringfx.ir.tiles import SCORE, TILE_OPS, Expr, const, map_children, walk
from ringfx.ir.tiles.operators import UNTRAINED
from ringfx.passes.detect.scores import SHIFT
from ringfx.passes.exprs.additive import FAR_BELOW
from ringfx.passes.masks.factors import constants
from ringfx.passes.masks.score_terms import ScoreTerms

__all__ = ["is_positive", "mapped", "trains", "without_mask"]

_GROWING = frozenset({
    "add", "mul", "div", "float", "double", "half", "bfloat16", "reciprocal", "sqrt", "rsqrt",
})  # fmt: skip
"""Of positive numbers they are positive."""


def mapped(
    head: str,
    parts: Sequence[ScoreTerms | Expr],
    plain: Callable[[Expr], Expr],
    reads_given: Callable[[Expr], bool],
) -> ScoreTerms | None:
    """An operator on scores and on values without scores, as a map; None where it is none.

    Parameters
    ----------
    plain
        A factor of the products as a tile function.
    reads_given
        Whether a tile function reads what each call gives anew, a mask perhaps.
    """
    op = TILE_OPS.get(head)
    if op is None or (op.pull is None and head not in UNTRAINED):
        return None
    scores = [part for part in parts if isinstance(part, ScoreTerms)]
    others = [part for part in parts if not isinstance(part, ScoreTerms)]
    if not all(map(_hides_nothing, scores)) or any(SHIFT in walk(e) or _is_far(e) for e in others):
        return None
    if any(reads_given(x.expr) or _is_far(x.expr) for part in scores for x in part.added):
        return None
    if any(part.factors != scores[0].factors for part in scores):
        scores = [_without_factors(part, plain) for part in scores]
    first = scores[0]
    maps = []
    for part in scores:
        ratio = _ratio(part, first)
        if ratio is None:
            return None
        maps.append(_of(_as_map(part), SCORE if ratio == 1 else ("mul", SCORE, const(ratio))))
    made = iter(maps)
    args = [next(made) if isinstance(part, ScoreTerms) else part for part in parts]
    return ScoreTerms(products=first.products, factors=first.factors, map=(head, *args))


def _hides_nothing(scores: ScoreTerms) -> bool:
    low = any(term.low for term in scores.terms)
    return not (scores.keep or scores.fillings or scores.slope or scores.apart or low)


def _is_far(expr: Expr) -> bool:
    """Whether it holds a number that hides a key."""
    products = (e for e in walk(expr) if e[0] == "mul")
    factors = [float(a[1]) for e in products for a in e[1:] if a[0] == "const"]
    return any(abs(c) >= -FAR_BELOW for c in (*constants(expr), *factors))


def _without_factors(scores: ScoreTerms, plain: Callable[[Expr], Expr]) -> ScoreTerms:
    """The factors in the map instead; of several products each may have its own, which stay."""
    own = [scores.factors.get(i, ()) for i in scores.products]
    if len(own) != 1:
        return scores
    score = SCORE
    for factor in own[0]:
        is_divisor = factor[0] == "reciprocal"
        score = ("div" if is_divisor else "mul", score, plain(factor[1] if is_divisor else factor))
    return ScoreTerms(products=scores.products, map=_of(_as_map(scores), score))


def _ratio(scores: ScoreTerms, first: ScoreTerms) -> float | None:
    """How many times the products of others the scores have."""
    if scores.products.keys() != first.products.keys() or scores.factors != first.factors:
        return None
    ratios = {c / first.products[i] for i, c in scores.products.items()}
    return ratios.pop() if len(ratios) == 1 else None


def _as_map(scores: ScoreTerms) -> Expr:
    """All that is done to the products, as a function of ``SCORE``."""
    found = scores.map or SCORE
    if scores.cap is not None:
        found = ("mul", ("tanh", SCORE), const(scores.cap))
    for added in scores.added:
        found = ("add", found, added.expr)
    return found


def _of(expr: Expr, score: Expr) -> Expr:
    """The map of other scores."""
    return score if expr == SCORE else map_children(lambda e: _of(e, score), expr)


def without_mask(scores: ScoreTerms) -> ScoreTerms | None:
    """Scores replaced by one low number, without what it hides; None for others."""
    is_one = len(scores.fillings) == 1 and scores.replaced and not scores.apart
    if not is_one or any(term.low for term in scores.terms):
        return None
    nothing = frozenset[float]()
    return replace(scores, keep=(), fillings=nothing, replaced=False, written=None, slope=None)


def is_positive(expr: Expr) -> bool:
    """Whether a factor leaves the order of scores as it is, whatever is trained."""
    head, *args = expr
    if head == "const":
        return bool(args[0] > 0)
    if head in ("exp", "softplus", "sigmoid"):
        return True
    if head in ("clamp_min", "max"):
        return any(map(is_positive, args))
    return head in _GROWING and all(map(is_positive, args))


def trains(expr: Expr) -> bool:
    """Whether scores have a gradient through a map, be it 0."""
    if expr == SCORE:
        return True
    if expr[0] == "at" or expr[0] in UNTRAINED:
        return False
    parts = expr[2:] if expr[0] == "where" else expr[1:]
    return expr[0] != "const" and any(map(trains, parts))
