"""Scores read step by step: what each operator of their expression does to their form.

Each operator is a row of ``FORM_RULES``. What has another form is refused with its reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch

from ringfx.ir.tiles import Expr
from ringfx.passes.exprs.additive import ABSORBS, Term, peeled, summands
from ringfx.passes.exprs.lift import Lifter
from ringfx.passes.exprs.simplify import FALSE, TRUE, const, is_boolean, simplify

__all__ = [
    "UNREAD", "Added", "Form", "Reader", "Unrepresentable", "absorbs", "constants", "has_threshold",
    "lifted",
]  # fmt: skip


UNREAD = 10 * ABSORBS
"""What scores are said to be filled with by a term that hides them by values not known here."""
ROUNDS_LITTLE = 100.0
"""A number added to all scores of a row changes nothing but their rounding; a larger one does."""


class Unrepresentable(Exception):
    """Why scores have no canonical form."""


@dataclass(frozen=True)
class Added:
    """Something added to the scores, and its summands as masks and the rest."""

    expr: Expr
    terms: tuple[Term, ...]


@dataclass(frozen=True, kw_only=True)
class Form:
    """Scores in canonical form; see the header of ``decompose.py``."""

    products: Mapping[int, float] = field(default_factory=dict)
    """c_i."""
    cap: float | None = None
    """cap * tanh(sum of c_i s_i): here the cap is not yet divided by."""
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
    factors: tuple[Expr, ...] = ()
    """Values that the products are multiplied with, or their reciprocals: elements of queries or of
    keys alone."""


class Reader:
    """Reads an expression of scores, given what its parts without scores are made of."""

    def __init__(self, lifter: Lifter, values: tuple[object, ...]) -> None:
        self.lifter = lifter
        self.values = values

    def read(self, expr: Expr) -> Form:
        head, *args = expr
        if head == "score":
            return Form(products={args[0][1]: 1.0})
        scores = [has_score(a) for a in args]
        if sum(scores) > 1:
            if head in ("add", "sub"):
                return _sum(self, self.read(args[0]), self.read(args[1]), head == "sub")
            raise Unrepresentable(f'two parts of its scores meet in "{head}"')
        rule = FORM_RULES.get(head)
        if rule is None:
            raise Unrepresentable(f'"{head}" stands between its product and its softmax')
        return rule(self, *args)

    def plain(self, expr: Expr) -> Expr:
        """A part without scores, as a tile function."""
        return lifted(expr, self.lifter, self.values)

    def make(self, head: str, *args: Expr) -> Expr:
        return self.lifter.make(head, *args)


def has_score(expr: Expr) -> bool:
    if expr[0] == "score":
        return True
    if expr[0] in _LEAVES:
        return False
    return any(has_score(a) for a in expr[1:])


def _number(expr: Expr) -> float | None:
    """The number that an expression is; float64 writes what float32 would round as a cast of it."""
    if expr[0] == "double":
        return _number(expr[1])
    return float(expr[1]) if expr[0] == "const" else None


_CASTS = frozenset({"float", "double", "half", "bfloat16", "int"})
_LEAVES = frozenset({"b", "h", "q", "k", "const", "at", "shift"})


def lifted(expr: Expr, lifter: Lifter, values: tuple[object, ...]) -> Expr:
    """The expression with every value lifted to what it is made of."""
    head, *args = expr
    if head in ("b", "h", "q", "k", "const", "shift"):
        return expr
    if head == "at":
        index = tuple(lifted(e, lifter, values) for e in args[1:])
        return lifter.element(values[args[0]], index)
    return lifter.make(head, *(lifted(a, lifter, values) for a in args))


def _sum(reader: Reader, a: Form, b: Form, minus: bool) -> Form:
    """Scores added to scores (products of parts of the head dim)."""
    if minus:
        b = _times(reader, b, -1.0)
    if a.cap is not None or b.cap is not None or a.factors or b.factors:
        raise Unrepresentable("two of its products are capped or scaled apart")
    products = dict(a.products)
    for i, c in b.products.items():
        products[i] = products.get(i, 0.0) + c
    fillings = a.fillings | b.fillings
    if any(f > ABSORBS for f in fillings) or (a.keep and b.keep and fillings != {-math.inf}):
        fillings |= {math.nan}  # masked scores of one are added to those of the other
    return Form(
        products=products, added=a.added + b.added, keep=a.keep + b.keep, fillings=fillings,
        replaced=a.replaced or b.replaced, written=_joined(reader, a.written, b.written),
        apart=a.apart or b.apart or a.slope is not None or b.slope is not None,
    )  # fmt: skip


def _joined(reader: Reader, a: Expr | None, b: Expr | None) -> Expr | None:
    if a is None or b is None:
        return b if a is None else a
    return reader.make("add", a, b)


def _times(reader: Reader, form: Form, c: float) -> Form:
    if not math.isfinite(c) or c == 0:
        raise Unrepresentable(f"its scores are multiplied with {c}")
    if c < 0 and (form.keep or any(t.low for x in form.added for t in x.terms)):
        raise Unrepresentable("its masked scores change their sign")
    inner = c if form.cap is None else math.copysign(1.0, c)
    return replace(
        form,
        products={i: inner * x for i, x in form.products.items()},
        cap=None if form.cap is None else abs(c) * form.cap,
        added=tuple(_addend(reader, _scaled(reader, x.expr, c)) for x in form.added),
        fillings=frozenset(c * f for f in form.fillings),
        written=None if form.written is None else _scaled(reader, form.written, c),
    )


def _scaled(reader: Reader, expr: Expr, c: float) -> Expr:
    if expr[0] == "add":
        return reader.make("add", *(_scaled(reader, part, c) for part in expr[1:]))
    if expr[0] == "where":
        return reader.make("where", expr[1], *(_scaled(reader, part, c) for part in expr[2:]))
    return reader.make("mul", expr, const(c))


def _add(reader: Reader, a: Expr, b: Expr) -> Form:
    scores, other = (a, b) if has_score(a) else (b, a)
    form = reader.read(scores)
    if other == ("shift",):
        return form
    return _plus(reader, form, reader.plain(other))


def _sub(reader: Reader, a: Expr, b: Expr) -> Form:
    if has_score(b):
        return _plus(reader, _times(reader, reader.read(b), -1.0), reader.plain(a))
    form = reader.read(a)
    if b == ("shift",):
        return form
    return _plus(reader, form, _scaled(reader, reader.plain(b), -1))


def _plus(reader: Reader, form: Form, expr: Expr) -> Form:
    """One more addend."""
    written = _joined(reader, form.written, expr)
    return replace(_weighed(reader, form, expr), written=written)


def _weighed(reader: Reader, form: Form, expr: Expr) -> Form:
    """What an addend says is kept, and what it adds."""
    if form.fillings == {0.0}:
        chosen = _beside(reader, form, expr)
        if chosen is not None:
            return chosen
    moving = _number(expr)
    if moving is not None and abs(moving) <= ROUNDS_LITTLE:  # the same for all keys of a row
        moved = frozenset(f + moving if f > ABSORBS else f for f in form.fillings)
        return replace(form, fillings=moved)
    added = _addend(reader, expr)
    for term in added.terms:
        form = _with_term(form, term)
    return replace(form, added=(*form.added, added))


def _addend(reader: Reader, expr: Expr) -> Added:
    return Added(expr, tuple(peeled(term, reader.make) for term in summands(expr)))


def _beside(reader: Reader, form: Form, term: Expr) -> Form | None:
    """scores * m + filling * (1 - m), with m as the only mask so far."""
    (kept,) = form.keep[-1:]
    inside, outside = (assume(term, kept, value) for value in (True, False))
    if outside[0] != "const" or inside == term:
        return None
    return _weighed(reader, replace(form, fillings=frozenset({float(outside[1])})), inside)


def absorbs(term: Term) -> bool:
    return term.low <= ABSORBS


def _with_term(form: Form, term: Term) -> Form:
    """What a term does to masked scores; a low one that absorbs none is weighed at the end."""
    if absorbs(term):
        both = {g for f in form.fillings for g in (f, f + term.low)}
        form = replace(form, keep=(*form.keep, term.keep), fillings=frozenset({term.low} | both))
        return form if term.added is None else _with_bias(form, term.added)
    if term.low < 0 or term.added is None:
        return form if not form.fillings else replace(form, fillings=form.fillings | _moved(form))
    return _with_bias(form, term.written)


def _with_bias(form: Form, term: Expr) -> Form:
    kept = _threshold(term)
    fillings = form.fillings | _moved(form)
    if kept is None:
        return replace(form, fillings=fillings)
    unknown = {math.nan} if form.fillings else set[float]()
    return replace(form, keep=(*form.keep, kept), fillings=fillings | {UNREAD} | unknown)


def _moved(form: Form) -> frozenset[float]:
    """A bias moves what masked scores were filled with, unless that absorbs it."""
    return frozenset() if all(f <= ABSORBS for f in form.fillings) else frozenset({math.nan})


def _threshold(term: Expr) -> Expr | None:
    """What a term keeps that masks by a huge factor of values not known here: (1 - m) * -3e38."""
    return ("gt", term, const(ABSORBS)) if any(c <= ABSORBS for c in constants(term)) else None


def has_threshold(keep: Expr | None) -> bool:
    """Whether a mask is read off huge factors, see ``_threshold``."""
    return keep is not None and ABSORBS in constants(keep)


def constants(expr: Expr) -> list[float]:
    if expr[0] == "const":
        return [expr[1]] if isinstance(expr[1], float) else []
    if expr[0] in ("b", "h", "q", "k"):
        return []
    parts = expr[2:] if expr[0] == "at" else expr[1:]
    return [c for part in parts for c in constants(part)]


def _conditions(expr: Expr) -> list[Expr]:
    """Truth values that an expression chooses by."""
    if expr[0] in ("b", "h", "q", "k", "const", "at"):
        return []
    inner = [c for part in expr[1:] for c in _conditions(part)]
    return [expr[1], *inner] if expr[0] == "where" else inner


def assume(expr: Expr, condition: Expr, value: bool) -> Expr:
    """The expression where a truth value is known."""
    if expr == condition:
        return TRUE if value else FALSE
    if expr[0] in ("b", "h", "q", "k", "const", "at"):
        return expr
    if expr[0] == "not" and expr[1] == condition:
        return FALSE if value else TRUE
    return simplify(expr[0], *(assume(a, condition, value) for a in expr[1:]))


def _mul(reader: Reader, a: Expr, b: Expr) -> Form:
    scores, other = (a, b) if has_score(a) else (b, a)
    form, factor = reader.read(scores), reader.plain(other)
    constant = _number(factor)
    if constant is not None:
        return _times(reader, form, constant)
    kept = _truth(reader, factor)
    if kept is not None:
        return _filled(reader, form, kept, 0.0)
    if _is_factor(form, other):
        return replace(form, factors=(*form.factors, other))
    raise Unrepresentable("its scores are multiplied with a value of queries and keys")


def _is_factor(form: Form, other: Expr) -> bool:
    """Whether queries or keys can be multiplied with a value in place of the scores."""
    if other[0] != "at" or form.added or form.keep or form.cap is not None:
        return False
    return not {"q", "k"} <= {n for e in other[2:] for n in _index_names(e)}


def _index_names(expr: Expr) -> set[str]:
    if expr[0] in ("b", "h", "q", "k"):
        return {expr[0]}
    if expr[0] == "const":
        return set()
    return {n for part in expr[1:] if isinstance(part, tuple) for n in _index_names(part)}


def _kept(reader: Reader, a: Expr, b: Expr) -> Form:
    """Exponentials that are left out of their sum: scores of -inf."""
    factor = reader.plain(b)
    kept = _truth(reader, factor)
    if kept is None:
        raise Unrepresentable("its exponentials are multiplied with what is not known to be 0 or 1")
    return _filled(reader, reader.read(a), kept, -math.inf)


def _truth(reader: Reader, factor: Expr) -> Expr | None:
    """The truth value that a factor of 0 and 1 is."""
    while factor[0] in _CASTS:
        factor = factor[1]
    captured = reader.lifter.captured
    if factor[0] == "at" and captured[factor[1]].meta["val"].dtype == torch.bool:
        return ("bool", factor)
    if is_boolean(factor):
        return factor
    for condition in _conditions(factor):
        inside, outside = assume(factor, condition, True), assume(factor, condition, False)
        pair = (inside[1], outside[1]) if inside[0] == "const" == outside[0] else None
        if pair == (1, 0):
            return condition
        if pair == (0, 1):
            return simplify("not", condition)
    return None


def _div(reader: Reader, a: Expr, b: Expr) -> Form:
    if has_score(b):
        raise Unrepresentable("it divides by its scores")
    form, divisor = reader.read(a), reader.plain(b)
    constant = _number(divisor)
    if constant:
        return _times(reader, form, 1 / constant)
    if _is_factor(form, b):
        return replace(form, factors=(*form.factors, ("reciprocal", b)))
    raise Unrepresentable("its scores are divided by a value of queries and keys")


def _tanh(reader: Reader, a: Expr) -> Form:
    form = reader.read(a)
    if form.cap is not None or form.added or form.keep:
        raise Unrepresentable("its soft cap comes after a mask or bias")
    return replace(form, cap=1.0)


def _where(reader: Reader, condition: Expr, a: Expr, b: Expr) -> Form:
    if has_score(condition):
        raise Unrepresentable("what is kept depends on its scores")
    kept = reader.plain(condition)
    if has_score(b):
        kept, a, b = reader.make("not", kept), b, a
    filling = _number(reader.plain(b))
    if filling is None:
        raise Unrepresentable("its masked scores are filled with something that varies")
    return _filled(reader, reader.read(a), kept, filling)


def _filled(reader: Reader, form: Form, kept: Expr, filling: float) -> Form:
    kept = kept if is_boolean(kept) else reader.make("bool", kept)
    low = any(not absorbs(t) and t.low < 0 for x in form.added for t in x.terms)
    fillings = form.fillings | {filling} | ({math.nan} if low else set())
    slope = form.slope
    if filling != -math.inf:
        slope = reader.make("where", kept, slope or const(1.0), const(0.0))
    return replace(
        form, keep=(*form.keep, kept), fillings=fillings, replaced=True, slope=slope,
        written=reader.make("where", kept, form.written or const(0.0), const(filling)),
    )  # fmt: skip


def _max(reader: Reader, a: Expr, b: Expr) -> Form:
    """Of two tensors: equal ones share the gradient."""
    return _lifted_to(reader, *_bounded(reader, a, b), tie=0.5)


def _clamp(reader: Reader, a: Expr, b: Expr) -> Form:
    return _lifted_to(reader, *_bounded(reader, a, b), tie=1.0)


def _lifted_to(reader: Reader, scores: Expr, bound: float, *, tie: float) -> Form:
    """A lower bound that no score comes near only lifts -inf."""
    if not bound <= ABSORBS:
        raise Unrepresentable(f"its scores are clamped at {bound:g}")
    form, low = reader.read(scores), const(bound)
    only_lifts = form.fillings <= {-math.inf}
    unknown = set[float]() if only_lifts else {math.nan}
    if form.written is None:
        return form
    slope, at = form.slope or const(1.0), reader.make("eq", form.written, low)
    slope = reader.make("where", at, reader.make("mul", slope, const(tie)), slope)
    return replace(
        form,
        fillings=frozenset(max(f, bound) for f in form.fillings) | unknown,
        replaced=form.replaced or bool(form.fillings and only_lifts),
        written=reader.make("max", form.written, low),
        slope=reader.make("where", reader.make("lt", form.written, low), const(0.0), slope),
    )  # fmt: skip


def _min(reader: Reader, a: Expr, b: Expr) -> Form:
    scores, bound = _bounded(reader, a, b)
    if not bound >= -ABSORBS:
        raise Unrepresentable(f"its scores are clamped at {bound:g}")
    return reader.read(scores)


def _bounded(reader: Reader, a: Expr, b: Expr) -> tuple[Expr, float]:
    scores, other = (a, b) if has_score(a) else (b, a)
    bound = _number(reader.plain(other))
    if bound is None:
        raise Unrepresentable("its scores are clamped by a value")
    return scores, bound


def _same(reader: Reader, a: Expr) -> Form:
    return reader.read(a)


def _neg(reader: Reader, a: Expr) -> Form:
    return _times(reader, reader.read(a), -1.0)


FORM_RULES: Mapping[str, Callable[..., Form]] = {
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "div": _div,
    "neg": _neg,
    "kept": _kept,
    "tanh": _tanh,
    "where": _where,
    "max": _max,
    "clamp": _clamp,
    "min": _min,
    "float": _same,
    "double": _same,
    "half": _same,
    "bfloat16": _same,
}
