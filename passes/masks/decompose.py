"""Scores as the canonical operator has them: a scale, a cap, a bias, what is kept.

The scores of a softmax are an expression of products s0, s1, ... and of tile functions. It is
brought to the form

    cap * tanh(sum_i c_i s_i / cap) + bias,  where keep;  elsewhere a filling

step by step (``forms.py``). What has another form is refused with its reason. A filling of -inf, or
of a number so low that adding scores to it changes nothing or that no score comes near, says that a
key is not kept; which of these it is decides what a row without any key gives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ringfx.passes.masks.additive import FAR_BELOW, Term, keeps_a_key, total
from ringfx.passes.masks.documents import in_positions
from ringfx.passes.masks.forms import Form, Reader, Unrepresentable, absorbs, constants
from ringfx.passes.masks.lift import Lifter
from ringfx.passes.masks.simplify import TRUE
from ringfx.tiles import Expr

__all__ = ["Scores", "decompose"]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What the canonical operator is told."""

    products: Mapping[int, float]
    cap: float | None
    bias: Expr | None
    keep: Expr | None
    written: Expr | None
    """What is kept, before positions of packed documents became indices."""
    factors: tuple[Expr, ...]
    fully_masked: Literal["zero", "mean", "absorbed", "nan"]
    filled: float | None


def decompose(
    expr: Expr,
    lifter: Lifter,
    values: tuple[object, ...],
    *,
    q_len: int,
    kv_len: int,
    empty_row: Literal["zero", "nan"],
) -> Scores:
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
    reader = Reader(lifter, values)
    return _finish(reader, reader.read(expr), q_len, kv_len, empty_row)


def _finish(
    reader: Reader, form: Form, q_len: int, kv_len: int, empty_row: Literal["zero", "nan"]
) -> Scores:
    terms = [term for added in form.added for term in added.terms]
    soft = [term for term in terms if not absorbs(term) and term.low < 0]
    keep = _all(reader, *form.keep, *(term.keep for term in soft))
    given = (bool(soft) or not form.fillings <= {-math.inf}) and _reads_given(reader, terms)
    certain = not (soft and _hides(terms)) and (form.replaced or not given)
    full = certain and keeps_a_key(keep, reader.make, q_len, kv_len)
    if not full:  # a soft term says more than what is kept: which masked key weighs most
        keep = _all(reader, *form.keep)
    written = not full and not form.replaced and (given or _is_ambiguous(form, bool(soft)))
    if written:  # added as it is written: exact, whatever the strengths, and no tile is left out
        soft = [term for term in terms if term.low != -math.inf]
        keep = _all(reader, *(term.keep for term in terms if term.low == -math.inf))
        form = replace(form, fillings=frozenset({-math.inf}))
    masks = {t.written: t.added for t in terms if full or t not in soft}
    bias: Expr | None = None
    for added in form.added:
        more = total(added.expr, masks)
        if more is not None:
            bias = more if bias is None else reader.make("add", bias, more)
    filled = [f for f in form.fillings if not math.isnan(f)]
    if any(f > FAR_BELOW for f in filled):
        raise Unrepresentable(
            f"its masked scores are filled with {max(filled):g}, which scores can come near"
        )
    masked = "zero" if full or keep == TRUE else _empty_rows(form, empty_row, bool(soft))
    capped = 1.0 if form.cap is None else form.cap
    found = in_positions(None if keep == TRUE else keep, reader.lifter.captured, reader.lifter.same)
    return Scores(
        products={i: c * capped for i, c in form.products.items()}, cap=form.cap, bias=bias,
        keep=None if found == TRUE else found, written=None if keep == TRUE else keep,
        factors=form.factors, fully_masked=masked,
        filled=None if written or not given else max(
            x for x in (*filled, *(t.low for t in soft if full)) if x > -math.inf
        ),
    )  # fmt: skip


def _hides(terms: Sequence[Term]) -> bool:
    """Whether a term that is no mask to us may hide keys as deep as a soft one: (1 - m) * -1e9.

    Then a key that a soft mask hides may weigh as much as all others of its row.
    """
    unread = [t.added for t in terms if t.low == 0 and t.added is not None]
    return any(-FAR_BELOW <= abs(c) < math.inf for added in unread for c in constants(added))


def _reads_given(reader: Reader, terms: Sequence[Term]) -> bool:
    """Whether what is added may hide keys as deep as any filling: a mask given with each call."""
    return any(t.added is not None and reader.lifter.reads_given(t.added) for t in terms)


def _empty_rows(
    form: Form, empty_row: Literal["zero", "nan"], soft: bool
) -> Literal["zero", "mean", "absorbed", "nan"]:
    if form.fillings == {-math.inf}:
        return empty_row
    if not _is_ambiguous(form, soft):
        return "mean" if form.replaced else "absorbed"
    raise Unrepresentable(
        "two masks of different strength meet, and a query whose keys are all masked would attend "
        "to those that are masked once"
    )


def _is_ambiguous(form: Form, soft: bool) -> bool:
    """Whether masked scores of one row may differ, so that a row without keys prefers some."""
    if form.fillings <= {-math.inf}:
        return False
    return len(form.fillings) != 1 or soft or math.isnan(*form.fillings)


def _all(reader: Reader, *parts: Expr) -> Expr:
    keep: Expr = TRUE
    for part in parts:
        keep = reader.make("and", keep, part)
    return keep
