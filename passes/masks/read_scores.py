"""Scores read step by step: what each operator of their expression does to their form.

Each operator is a row of ``SCORE_RULES``. Scores of another form are refused with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ringfx.ir.tiles import Expr, indices_used, walk
from ringfx.passes.detect.scores import SHIFT
from ringfx.passes.exprs.additive import ABSORBS, FAR_BELOW
from ringfx.passes.exprs.lift import Lifter, lifted
from ringfx.passes.masks.factors import as_number, as_truth
from ringfx.passes.masks.score_maps import is_positive, mapped, without_mask
from ringfx.passes.masks.score_terms import (
    ScoreTerms,
    TooHigh,
    Unrepresentable,
    clamped,
    filled,
    multiplied,
    plus,
    scaled,
    summed,
    times,
)
from ringfx.torch_compat.releases import clamp_tie

__all__ = ["SCORE_RULES", "Reader"]


class Reader:
    """Reads an expression of scores, given what its parts without scores are made of."""

    def __init__(
        self, lifter: Lifter, values: tuple[object, ...], *, maps_fillings: bool = False
    ) -> None:
        self.lifter = lifter
        self.values = values
        self.make = lifter.make
        self.maps_fillings = maps_fillings
        """Numbers that real scores may reach are scores of their own, and hide nothing."""
        self._known: dict[Expr, ScoreTerms | Unrepresentable] = {}

    def read(self, expr: Expr) -> ScoreTerms:
        if expr not in self._known:
            try:
                self._known[expr] = self._read(expr)
            except Unrepresentable as reason:
                self._known[expr] = reason
        found = self._known[expr]
        if isinstance(found, Unrepresentable):
            raise found
        return found

    def _read(self, expr: Expr) -> ScoreTerms:
        """By its rule, or else as a function of each score by itself."""
        try:
            return self._by_rule(expr)
        except Unrepresentable:
            found = self._mapped(*expr)
            if found is None:
                raise
            return found

    def _mapped(self, head: str, *args: Expr) -> ScoreTerms | None:
        try:
            parts = [self.read(e) if _has_score(e) else self.plain(e) for e in args]
        except Unrepresentable:
            return None
        return self._as_map(head, parts) or self._scaled_beside_mask(head, parts)

    def _as_map(self, head: str, parts: Sequence[ScoreTerms | Expr]) -> ScoreTerms | None:
        return mapped(head, parts, self.plain, self.lifter.reads_given)

    def _scaled_beside_mask(
        self, head: str, parts: Sequence[ScoreTerms | Expr]
    ) -> ScoreTerms | None:
        """Masked scores times something positive: what is low stays low, and all of it alike."""
        if head not in ("mul", "div"):
            return None
        scores, factor = parts
        if head == "mul" and isinstance(factor, ScoreTerms):
            scores, factor = factor, scores
        if not isinstance(scores, ScoreTerms) or isinstance(factor, ScoreTerms):
            return None
        if not is_positive(factor):
            return None
        shown = without_mask(scores)
        found = None if shown is None else self._as_map(head, (shown, factor))
        if found is None:
            return None
        (filling,) = scores.fillings
        for kept in scores.keep:
            found = filled(found, kept, filling, self.make)
        return replace(found, apart=True)  # another mask would meet a number not known here

    def _by_rule(self, expr: Expr) -> ScoreTerms:
        head, *args = expr
        if head == "score":
            return ScoreTerms(products={args[0][1]: 1.0})
        if sum(map(_has_score, args)) > 1:
            if head in ("add", "sub"):
                left, right = map(self.read, args)
                right = times(right, -1.0, self.make) if head == "sub" else right
                return summed(left, right, self.make)
            raise Unrepresentable(f'"{head}" combines two parts of its scores')
        rule = SCORE_RULES.get(head)
        if rule is None:
            raise Unrepresentable(f'"{head}" stands between its product and its softmax')
        return rule(self, *args)

    def plain(self, expr: Expr) -> Expr:
        """A part without scores, as a tile function."""
        return lifted(expr, self.lifter, self.values)


def _has_score(expr: Expr) -> bool:
    return any(part[0] == "score" for part in walk(expr))


def _parted(a: Expr, b: Expr) -> tuple[Expr, Expr]:
    """The operand with scores, then the other."""
    return (a, b) if _has_score(a) else (b, a)


def _read_add(reader: Reader, a: Expr, b: Expr) -> ScoreTerms:
    scores, other = _parted(a, b)
    found = reader.read(scores)
    return found if other == SHIFT else plus(found, reader.plain(other), reader.make)


def _read_sub(reader: Reader, a: Expr, b: Expr) -> ScoreTerms:
    if _has_score(b):
        negative = times(reader.read(b), -1.0, reader.make)
        return plus(negative, reader.plain(a), reader.make)
    found = reader.read(a)
    if b == SHIFT:
        return found
    return plus(found, scaled(reader.plain(b), -1, reader.make), reader.make)


def _read_mul(reader: Reader, a: Expr, b: Expr) -> ScoreTerms:
    scores, other = _parted(a, b)
    found, factor = reader.read(scores), reader.plain(other)
    constant = as_number(factor)
    if constant is not None:
        return times(found, constant, reader.make)
    kept = as_truth(factor, reader.lifter.captured)
    if kept is not None and not reader.maps_fillings:
        return filled(found, kept, 0.0, reader.make)
    if _is_factor(found, other):
        return multiplied(found, other)
    raise Unrepresentable("its scores are multiplied by a value of queries and keys")


def _read_div(reader: Reader, a: Expr, b: Expr) -> ScoreTerms:
    if _has_score(b):
        raise Unrepresentable("it divides by its scores")
    found, divisor = reader.read(a), reader.plain(b)
    constant = as_number(divisor)
    if constant:
        return times(found, 1 / constant, reader.make)
    if _is_factor(found, b):
        return multiplied(found, ("reciprocal", b))
    raise Unrepresentable("its scores are divided by a value of queries and keys")


def _is_factor(scores: ScoreTerms, other: Expr) -> bool:
    """Whether queries or keys can be multiplied with a value in place of the scores."""
    if other[0] != "at" or scores.added or scores.keep or scores.is_mapped:
        return False
    return not {"q", "k"} <= indices_used(other)


def _read_kept(reader: Reader, a: Expr, b: Expr) -> ScoreTerms:
    """Exponentials that are left out of their sum: scores of -inf."""
    kept = as_truth(reader.plain(b), reader.lifter.captured)
    if kept is None:
        raise Unrepresentable(
            "its exponentials are multiplied by a value that is not known to be 0 or 1"
        )
    return filled(reader.read(a), kept, -math.inf, reader.make)


def _read_tanh(reader: Reader, a: Expr) -> ScoreTerms:
    found = reader.read(a)
    if found.is_mapped or found.added or found.keep:
        raise Unrepresentable("its soft cap is applied after a mask or bias")
    return replace(found, cap=1.0)


def _read_where(reader: Reader, condition: Expr, a: Expr, b: Expr) -> ScoreTerms:
    if _has_score(condition):
        raise Unrepresentable("its mask depends on its scores")
    kept = reader.plain(condition)
    if _has_score(b):
        kept, a, b = reader.make("not", kept), b, a
    filling = as_number(reader.plain(b))
    if filling is None:
        raise Unrepresentable("its mask fill value is not a constant")
    if reader.maps_fillings and filling > FAR_BELOW:
        raise TooHigh(filling)
    return filled(reader.read(a), kept, filling, reader.make)


def _read_lower_bound(reader: Reader, a: Expr, b: Expr, tie: float) -> ScoreTerms:
    scores, bound = _bounded(reader, a, b)
    if not bound <= ABSORBS:
        raise Unrepresentable(f"its scores are clamped at {bound:g}")
    return clamped(reader.read(scores), bound, tie, reader.make)


def _read_min(reader: Reader, a: Expr, b: Expr) -> ScoreTerms:
    scores, bound = _bounded(reader, a, b)
    if not bound >= -ABSORBS:
        raise Unrepresentable(f"its scores are clamped at {bound:g}")
    return reader.read(scores)


def _bounded(reader: Reader, a: Expr, b: Expr) -> tuple[Expr, float]:
    scores, other = _parted(a, b)
    bound = as_number(reader.plain(other))
    if bound is None:
        raise Unrepresentable("its scores are clamped at a bound that is not a constant")
    return scores, bound


SCORE_RULES: Mapping[str, Callable[..., ScoreTerms]] = {
    "add": _read_add,
    "sub": _read_sub,
    "mul": _read_mul,
    "div": _read_div,
    "neg": lambda reader, a: times(reader.read(a), -1.0, reader.make),
    "kept": _read_kept,
    "tanh": _read_tanh,
    "where": _read_where,
    # Of two equal tensors each has half of the gradient; only -inf is lifted to a number.
    "max": lambda reader, a, b: _read_lower_bound(reader, a, b, tie=0.5),
    "lift": lambda reader, a, b: _read_lower_bound(reader, a, b, tie=1.0),
    "clamp_min": lambda reader, a, b: _read_lower_bound(reader, a, b, tie=clamp_tie()),
    "clamp_max": _read_min,
    "min": _read_min,
    **dict.fromkeys(("float", "double", "half", "bfloat16"), Reader.read),
}
