"""Scores in canonical form, and what an operator on them does to it.

``map(sum_i c_i s_i) + added, where keep; elsewhere a filling``, the map a soft cap or any function
of each score by itself; see ``decompose.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ringfx.ir.tiles import Expr, const
from ringfx.passes.exprs.additive import ABSORBS, Make, Term, peeled, summands
from ringfx.passes.exprs.simplify import assuming, is_boolean
from ringfx.passes.masks.factors import as_number, threshold

__all__ = [
    "UNREAD", "Added", "ScoreTerms", "TooHigh", "Unrepresentable", "absorbs", "clamped", "filled",
    "multiplied", "plus", "scaled", "summed", "times",
]  # fmt: skip


UNREAD = 10 * ABSORBS
"""What scores are said to be filled with by a term that hides them by values not known here."""
ROUNDS_LITTLE = 100.0
"""A number added to all scores of a row changes nothing but their rounding; a larger one does."""


class Unrepresentable(Exception):
    """Why scores have no canonical form."""


class TooHigh(Unrepresentable):
    """A mask fills scores with a number that others may reach."""

    def __init__(self, filling: float) -> None:
        super().__init__(
            f"mask fill value {filling:g} is too high to act as -inf: real scores may reach it"
        )


@dataclass(frozen=True)
class Added:
    """Something added to the scores, and its summands as masks and the rest."""

    expr: Expr
    terms: tuple[Term, ...]

    @staticmethod
    def of(expr: Expr, make: Make) -> Added:
        return Added(expr, tuple(peeled(term, make) for term in summands(expr)))


@dataclass(frozen=True, kw_only=True)
class ScoreTerms:
    """What scores are made of."""

    products: Mapping[int, float] = field(default_factory=dict)
    """c_i."""
    cap: float | None = None
    """cap * tanh(sum of c_i s_i): here the cap is not yet divided by."""
    map: Expr | None = None
    """What is done to each sum of c_i s_i, as a function of ``SCORE``; there is no cap then."""
    added: tuple[Added, ...] = ()
    keep: tuple[Expr, ...] = ()
    """All must hold."""
    fillings: frozenset[float] = frozenset()
    """Values of scores that are not kept; NaN for one that is not known."""
    replaced: bool = False
    """Some scores were replaced by their filling: their gradient is 0."""
    written: Expr | None = None
    """All that is added to the products, fillings as well, in the order of the calls."""
    slope: Expr | None = None
    """The derivative of the scores by their products where it is not 1: 0 where replaced."""
    apart: bool = False
    """Products that are added were replaced apart: ``written`` does not say it."""
    factors: Mapping[int, tuple[Expr, ...]] = field(default_factory=dict)
    """Values that a product is multiplied with, or their reciprocals: elements of queries or of
    keys alone."""

    @property
    def is_mapped(self) -> bool:
        return self.cap is not None or self.map is not None

    @property
    def terms(self) -> tuple[Term, ...]:
        """All summands of what is added."""
        return tuple(term for added in self.added for term in added.terms)


def absorbs(term: Term) -> bool:
    return term.low <= ABSORBS


def summed(a: ScoreTerms, b: ScoreTerms, make: Make) -> ScoreTerms:
    """Scores added to scores (products of parts of the head dim)."""
    shared = a.products.keys() & b.products.keys()
    if a.is_mapped or b.is_mapped or any(a.factors.get(i) != b.factors.get(i) for i in shared):
        raise Unrepresentable("its products are capped or scaled separately before they are added")
    products = dict(a.products)
    for i, c in b.products.items():
        products[i] = products.get(i, 0.0) + c
    fillings = a.fillings | b.fillings
    if any(f > ABSORBS for f in fillings) or (a.keep and b.keep and fillings != {-math.inf}):
        fillings |= {math.nan}  # masked scores of one are added to those of the other
    return ScoreTerms(
        products=products, added=a.added + b.added, keep=a.keep + b.keep, fillings=fillings,
        replaced=a.replaced or b.replaced, written=_joined(a.written, b.written, make),
        apart=a.apart or b.apart or a.slope is not None or b.slope is not None,
        factors={**a.factors, **b.factors},
    )  # fmt: skip


def _joined(a: Expr | None, b: Expr | None, make: Make) -> Expr | None:
    if a is None or b is None:
        return b if a is None else a
    return make("add", a, b)


def times(scores: ScoreTerms, c: float, make: Make) -> ScoreTerms:
    """Scores times a number."""
    if not math.isfinite(c) or c == 0:
        raise Unrepresentable(f"its scores are multiplied by {c}")
    if c < 0 and (scores.keep or any(term.low for term in scores.terms)):
        raise Unrepresentable("its masked scores are multiplied by a negative number")
    inner = c if not scores.is_mapped else math.copysign(1.0, c) if scores.map is None else 1.0
    return replace(
        scores,
        products={i: inner * x for i, x in scores.products.items()},
        cap=None if scores.cap is None else abs(c) * scores.cap,
        map=None if scores.map is None else ("mul", scores.map, const(c)),
        added=tuple(Added.of(scaled(x.expr, c, make), make) for x in scores.added),
        fillings=frozenset(c * f for f in scores.fillings),
        written=None if scores.written is None else scaled(scores.written, c, make),
    )


def multiplied(scores: ScoreTerms, factor: Expr) -> ScoreTerms:
    """Products times a value of queries or of keys."""
    factors = {i: (*scores.factors.get(i, ()), factor) for i in scores.products}
    return replace(scores, factors=factors)


def scaled(expr: Expr, c: float, make: Make) -> Expr:
    """An addend times a number, each summand and choice apart."""
    if expr[0] == "add":
        return make("add", *(scaled(part, c, make) for part in expr[1:]))
    if expr[0] == "where":
        return make("where", expr[1], *(scaled(part, c, make) for part in expr[2:]))
    return make("mul", expr, const(c))


def plus(scores: ScoreTerms, expr: Expr, make: Make) -> ScoreTerms:
    """One more addend."""
    written = _joined(scores.written, expr, make)
    return replace(_weighed(scores, expr, make), written=written)


def _weighed(scores: ScoreTerms, expr: Expr, make: Make) -> ScoreTerms:
    """What an addend says is kept, and what it adds."""
    if scores.fillings == {0.0}:
        chosen = _beside_mask(scores, expr, make)
        if chosen is not None:
            return chosen
    moving = as_number(expr)
    if moving is not None and abs(moving) <= ROUNDS_LITTLE:  # the same for all keys of a row
        moved = frozenset(f + moving if f > ABSORBS else f for f in scores.fillings)
        return replace(scores, fillings=moved)
    added = Added.of(expr, make)
    for term in added.terms:
        scores = _with_term(scores, term)
    return replace(scores, added=(*scores.added, added))


def _beside_mask(scores: ScoreTerms, term: Expr, make: Make) -> ScoreTerms | None:
    """scores * m + filling * (1 - m), with m as the only mask so far."""
    (kept,) = scores.keep[-1:]
    inside, outside = (assuming(term, kept, value) for value in (True, False))
    if outside[0] != "const" or inside == term:
        return None
    return _weighed(replace(scores, fillings=frozenset({float(outside[1])})), inside, make)


def _with_term(scores: ScoreTerms, term: Term) -> ScoreTerms:
    """What a term does to masked scores; a low one that absorbs none is weighed at the end."""
    if absorbs(term):
        low = {g for f in scores.fillings for g in (f, f + term.low)} | {term.low}
        scores = replace(scores, keep=(*scores.keep, term.keep), fillings=frozenset(low))
        return scores if term.added is None else _with_bias(scores, term.added)
    if term.low < 0 or term.added is None:
        return replace(scores, fillings=scores.fillings | _moved_fillings(scores))
    return _with_bias(scores, term.written)


def _with_bias(scores: ScoreTerms, term: Expr) -> ScoreTerms:
    kept = threshold(term)
    fillings = scores.fillings | _moved_fillings(scores)
    if kept is None:
        return replace(scores, fillings=fillings)
    unknown = {math.nan} if scores.fillings else set[float]()
    return replace(scores, keep=(*scores.keep, kept), fillings=fillings | {UNREAD} | unknown)


def _moved_fillings(scores: ScoreTerms) -> frozenset[float]:
    """A bias moves what masked scores were filled with, unless that absorbs it."""
    return frozenset() if all(f <= ABSORBS for f in scores.fillings) else frozenset({math.nan})


def filled(scores: ScoreTerms, kept: Expr, filling: float, make: Make) -> ScoreTerms:
    """Scores that are replaced by a number where they are not kept."""
    kept = kept if is_boolean(kept) else make("bool", kept)
    low = any(not absorbs(term) and term.low < 0 for term in scores.terms)
    fillings = scores.fillings | {filling} | ({math.nan} if low else set())
    slope = scores.slope
    if filling != -math.inf:
        slope = make("where", kept, slope or const(1.0), const(0.0))
    return replace(
        scores, keep=(*scores.keep, kept), fillings=fillings, replaced=True, slope=slope,
        written=make("where", kept, scores.written or const(0.0), const(filling)),
    )  # fmt: skip


def clamped(scores: ScoreTerms, bound: float, tie: float, make: Make) -> ScoreTerms:
    """Scores of at least a bound that no score comes near: it only lifts -inf.

    Parameters
    ----------
    tie
        The part of the gradient that a score gets which equals the bound.
    """
    only_lifts = scores.fillings <= {-math.inf}
    unknown = set[float]() if only_lifts else {math.nan}
    if scores.written is None:
        return scores
    slope, low = scores.slope or const(1.0), const(bound)
    at_bound = make("eq", scores.written, low)
    slope = make("where", at_bound, make("mul", slope, const(tie)), slope)
    return replace(
        scores,
        fillings=frozenset(max(f, bound) for f in scores.fillings) | unknown,
        replaced=scores.replaced or bool(scores.fillings and only_lifts),
        written=make("max", scores.written, low),
        slope=make("where", make("lt", scores.written, low), const(0.0), slope),
    )  # fmt: skip
