"""Scores as the canonical operator has them: a scale, a cap, a bias, what is kept.

The scores of a softmax are an expression of products s0, s1, ... and of tile functions. It is
brought to the form

    map(sum_i c_i s_i) + bias,  where keep;  elsewhere a filling

step by step (``read_scores.py``), the map a soft cap or a function of each score by itself
(``score_maps.py``). Scores of another form are refused with the reason. A filling of
-inf, or of a number so low that adding scores to it changes nothing or that no score comes near,
says that a key is not kept; which of these it is decides what a row without any key gives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ringfx.ir.tiles import TRUE, Expr
from ringfx.passes.exprs.additive import FAR_BELOW, Term, keeps_a_key, total
from ringfx.passes.exprs.lift import Lifter
from ringfx.passes.masks.documents import in_positions
from ringfx.passes.masks.factors import constants
from ringfx.passes.masks.read_scores import Reader
from ringfx.passes.masks.score_maps import trains
from ringfx.passes.masks.score_terms import (
    UNREAD,
    Added,
    ScoreTerms,
    TooHigh,
    Unrepresentable,
    absorbs,
)

__all__ = ["CanonicalScores", "decompose"]

MANY_TIMES = 1_000.0
"""A mask this many times weaker than another leaves what it hides far above what that one hides."""


@dataclass(frozen=True, kw_only=True)
class CanonicalScores:
    """The scores that the canonical operator computes."""

    products: Mapping[int, float]
    cap: float | None
    score_map: Expr | None
    bias: Expr | None
    keep: Expr | None
    written: Expr | None
    """What is kept, before positions of packed documents became indices."""
    factors: Mapping[int, tuple[Expr, ...]]
    """Of each product that has some."""
    fully_masked: Literal["zero", "mean", "absorbed", "nan"]
    slope: Expr | None


def decompose(
    expr: Expr,
    lifter: Lifter,
    values: tuple[object, ...],
    *,
    q_len: int,
    kv_len: int,
    empty_row: Literal["zero", "nan"],
) -> CanonicalScores:
    """The canonical form of an expression of scores.

    Parameters
    ----------
    expr
        With ``score(i)`` for products and ``("at", j, ...)`` for ``values``.
    empty_row
        What the softmax gives for a row of -inf.

    Raises
    ------
    Unrepresentable
        With the reason.
    """
    for maps_fillings in (False, True):
        reader = Reader(lifter, values, maps_fillings=maps_fillings)
        try:
            return _finish(reader, reader.read(expr), q_len, kv_len, empty_row)
        except TooHigh as reason:
            too_high = reason
    raise too_high


def _finish(
    reader: Reader, scores: ScoreTerms, q_len: int, kv_len: int, empty_row: Literal["zero", "nan"]
) -> CanonicalScores:
    filled = [f for f in scores.fillings if not math.isnan(f)]
    if any(f > FAR_BELOW for f in filled):
        raise TooHigh(max(filled))
    if scores.map is not None and not trains(scores.map):
        raise Unrepresentable("its scores are only compared: no gradient flows through them")
    terms = scores.terms
    soft = [term for term in terms if not absorbs(term) and term.low < 0]
    keep = _all_of(reader, *scores.keep, *(term.keep for term in soft))
    low = [*(term.low for term in soft), *scores.fillings]
    own = (-math.inf, UNREAD)  # such a term hides no deeper than itself
    deep = _hides(reader, terms, [f for f in low if f not in own])
    full = not deep and keeps_a_key(keep, reader.make, q_len, kv_len)
    if not full:  # a soft term says more than what is kept: which masked key weighs most
        keep = _all_of(reader, *scores.keep)
    if not full and (deep or _is_ambiguous(scores, bool(soft))):
        scores = _as_written(reader, scores)
        terms = scores.terms
        soft = [term for term in terms if term.low != -math.inf]
        keep = _all_of(reader, *scores.keep)
    else:
        scores = replace(scores, slope=None)
    masks = {t.written: t.added for t in terms if full or t not in soft}
    bias: Expr | None = None
    for added in scores.added:
        more = total(added.expr, masks)
        if more is not None:
            bias = more if bias is None else reader.make("add", bias, more)
    given = _reads_given(reader, terms)  # one may be -inf
    certain = (full or keep == TRUE) and not given and not _maps_given(reader, scores)
    masked = "zero" if certain else _empty_rows(scores, empty_row)
    capped = 1.0 if scores.cap is None else scores.cap
    found = in_positions(None if keep == TRUE else keep, reader.lifter.captured, reader.lifter.same)
    return CanonicalScores(
        products={i: c * capped for i, c in scores.products.items()}, cap=scores.cap,
        score_map=scores.map, bias=bias, keep=None if found == TRUE else found,
        written=None if keep == TRUE else keep, factors=scores.factors, fully_masked=masked,
        slope=scores.slope,
    )  # fmt: skip


def _as_written(reader: Reader, scores: ScoreTerms) -> ScoreTerms:
    """Added as it is written: exact, whatever the strengths, and no tile is left out for them."""
    if scores.apart:
        raise Unrepresentable(
            "two masks with different fill values are added: a query whose keys are all masked "
            "would attend to the keys that only one of them masks"
        )
    assert scores.written is not None, "something masks"
    added = Added.of(scores.written, reader.make)
    return replace(
        scores,
        added=(added,),
        keep=tuple(term.keep for term in added.terms if term.low == -math.inf),
        fillings=frozenset({-math.inf}),
    )


def _hides(reader: Reader, terms: Sequence[Term], fillings: Sequence[float]) -> bool:
    """Whether a term that is no mask to us may hide keys as deep as those that one of our fills.

    Then a key that a mask hides may weigh as much as all others of its row. Such a term holds a
    number as large, (1 - m) * -1e9, or is given with each call.
    """
    if not fillings:
        return False
    depth = -max((f for f in fillings if not math.isnan(f)), default=FAR_BELOW)
    least = max(-FAR_BELOW, depth / MANY_TIMES)
    found = (abs(c) for t in terms if t.added is not None for c in constants(t.added))
    return any(least <= c < math.inf for c in found) or _reads_given(reader, terms)


def _reads_given(reader: Reader, terms: Sequence[Term]) -> bool:
    return any(t.added is not None and reader.lifter.reads_given(t.added) for t in terms)


def _maps_given(reader: Reader, scores: ScoreTerms) -> bool:
    return scores.map is not None and reader.lifter.reads_given(scores.map)


def _empty_rows(
    scores: ScoreTerms, empty_row: Literal["zero", "nan"]
) -> Literal["zero", "mean", "absorbed", "nan"]:
    if scores.fillings <= {-math.inf}:
        return empty_row
    return "mean" if scores.replaced else "absorbed"


def _is_ambiguous(scores: ScoreTerms, soft: bool) -> bool:
    """Whether masked scores of one row may differ, so that a row without keys prefers some."""
    if scores.fillings <= {-math.inf}:
        return False
    return len(scores.fillings) != 1 or soft or math.isnan(*scores.fillings)


def _all_of(reader: Reader, *parts: Expr) -> Expr:
    keep: Expr = TRUE
    for part in parts:
        keep = reader.make("and", keep, part)
    return keep
