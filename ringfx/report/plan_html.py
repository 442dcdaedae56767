"""A plan as one self-contained page: the answer, charts, then all of it; no script, no other file.

The pages are templates in ``page``. What is computed here are the values that they show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

from jinja2 import Environment, PackageLoader, StrictUndefined

from ringfx.errors import OutOfMemory, RingfxError, Shortfall
from ringfx.ir import plan_words
from ringfx.ir.folding import FoldedLayers, FoldedMoves, fold, fold_moves, folded_bytes
from ringfx.ir.note import texts_of
from ringfx.ir.plan import Plan
from ringfx.ir.plan_words import Part
from ringfx.report.charts import Chart, Value, chart
from ringfx.report.plan_views import memory_bytes, strategy_mix
from ringfx.units.format import format_budget, format_bytes, format_ms, format_tokens

__all__ = ["Curve", "refused_html", "to_html"]

Curve: TypeAlias = Sequence[tuple[int, Plan | RingfxError]]

MOST_PARTS = 7
"""Parts of a sum with a colour of their own; the others are one."""


def to_html(plan: Plan, lengths: Curve = (), ranks: Curve = (), name: str = "") -> str:
    """The page of a plan.

    Parameters
    ----------
    lengths, ranks
        The same model at other lengths, and over other numbers of ranks: the number, and the plan
        or why there is none.
    name
        What was planned.
    """
    return _rendered(
        "plan.html",
        name=name,
        plan=plan,
        gauge=_gauge(plan),
        memory=_sum_of(plan_words.memory_parts(plan), format_bytes),
        time=_sum_of(plan_words.time_parts(plan), format_ms),
        groups=[_layer_row(group, plan) for group in fold(plan.layers)],
        moves=_by_kind(plan),
        blocks=folded_bytes(plan.memory.by_block),
        over_program=_over_program(plan),
        sweeps=[
            _sweep("Other lengths", "tokens", lengths, plan),
            _sweep("Other numbers of ranks", "ranks", ranks, plan),
        ],
        notes=texts_of(plan.notes),
    )


def refused_html(error: OutOfMemory, name: str = "", asked: str = "") -> str:
    """The page of a budget that nothing fits.

    Parameters
    ----------
    asked
        What was to be planned: length, ranks.
    """
    shortfall = error.shortfall
    assert shortfall is not None, "of a plan"
    parts = [
        Part(cause=cause, amount=size, words=format_bytes(size), share=size / shortfall.needed)
        for cause, size in shortfall.causes
    ]
    return _rendered(
        "refused.html",
        name=name,
        asked=asked,
        shortfall=shortfall,
        gauge=_refused_gauge(shortfall),
        memory=_sum_of(parts, format_bytes),
        text=str(error),
    )


def _rendered(template: str, **values: object) -> str:
    return _pages().get_template(template).render(words=plan_words, **values)


@cache
def _pages() -> Environment:
    """Everything that a model says is escaped."""
    pages = Environment(
        loader=PackageLoader("ringfx.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters |= {
        "bytes": format_bytes,
        "ms": format_ms,
        "percent": lambda share: f"{share:.0%}",
        "number": lambda count: f"{count:,.0f}",
    }
    return pages


# --- sums -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Gauge:
    """The peak against the budget."""

    peak: int
    budget: int | None
    full: int
    """Bytes that the whole width stands for."""


def _gauge(plan: Plan) -> Gauge | None:
    peak, budget = plan.memory.peak_bytes, plan.gpu_memory
    return Gauge(peak=peak, budget=budget, full=max(peak, budget or 0)) if peak else None


def _refused_gauge(shortfall: Shortfall) -> Gauge:
    needed, budget = shortfall.needed, shortfall.budget
    return Gauge(peak=needed, budget=budget, full=max(needed, budget))


@dataclass(frozen=True, kw_only=True)
class Sum:
    """Parts of a sum, the greatest first; ``others`` are those that share one colour."""

    parts: tuple[Part, ...]
    others: tuple[Part, ...] = ()
    rest: Part | None = None
    """The others as one."""


def _sum_of(parts: Sequence[Part], words: plan_words.Words) -> Sum:
    rest = plan_words.rest_of(parts, MOST_PARTS, words)
    if rest is None:
        return Sum(parts=tuple(parts))
    return Sum(parts=tuple(parts[:MOST_PARTS]), others=tuple(parts[MOST_PARTS:]), rest=rest)


def _over_program(plan: Plan) -> tuple[int, ...]:
    """Bytes over the program; nothing where they are more than the peak, as plans of before say
    that counted what is offloaded."""
    sizes = plan.memory.over_program
    return sizes if max(sizes, default=0) <= plan.memory.peak_bytes else ()


# --- layers and messages --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """Equal layers; milliseconds and shares are those of all of them."""

    group: FoldedLayers
    total_ms: float
    compute_share: float
    """Of all attention of a step."""
    exposed_share: float
    lines: tuple[str, ...]


def _layer_row(group: FoldedLayers, plan: Plan) -> LayerRow:
    axes = len({layer.axis for layer in plan.split_layers}) > 1
    layer, whole = group.layers[0], plan.total_ms or 1.0
    return LayerRow(
        group=group,
        total_ms=sum(x.total_ms for x in group.layers),
        compute_share=sum(x.compute_ms for x in group.layers) / whole,
        exposed_share=sum(x.exposed_ms for x in group.layers) / whole,
        lines=(*plan_words.site_lines(layer), *plan_words.choice_lines(layer, axes)),
    )


@dataclass(frozen=True, kw_only=True)
class KindRow:
    """Messages of one kind."""

    kind: str
    count: int
    bytes: int
    share: float
    """Of the bytes of all messages."""
    groups: tuple[FoldedMoves, ...]


def _by_kind(plan: Plan) -> list[KindRow]:
    kinds: dict[str, list[FoldedMoves]] = {}
    for group in fold_moves(plan.collectives):
        kinds.setdefault(group.kind_words, []).append(group)
    return [_kind_row(kind, groups, plan.collective_bytes) for kind, groups in kinds.items()]


def _kind_row(kind: str, groups: Sequence[FoldedMoves], whole: int) -> KindRow:
    size = sum(group.bytes for group in groups)
    return KindRow(
        kind=kind,
        count=sum(len(group.moves) for group in groups),
        bytes=size,
        share=size / (whole or 1),
        groups=tuple(groups),
    )


# --- curves ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The same model elsewhere: two charts, and their figures in rows."""

    title: str
    unit: str
    charts: tuple[Chart, ...]
    rows: tuple[tuple[str, ...], ...]
    """Number, strategies or why there is no plan, time, memory."""


def _sweep(title: str, unit: str, curve: Curve, plan: Plan) -> Sweep | None:
    """None: too few of them have a plan to draw."""
    plans = [found for _, found in curve if isinstance(found, Plan)]
    if len(plans) < 2:
        return None
    is_whole = all(found.step_ms for found in plans)
    times = [_value(n, unit, found, plan, _time(found, is_whole)) for n, found in curve]
    sizes = [_value(n, unit, found, plan, _size(found)) for n, found in curve]
    budget = plan.gpu_memory
    words = f"budget {format_budget(budget)}" if budget else ""
    return Sweep(
        title=title,
        unit=unit,
        charts=(
            chart(f"Time of {'a step' if is_whole else 'attention, a step'}", times, format_ms),
            chart("Peak of one rank's memory", sizes, format_bytes, budget, words),
        ),
        rows=tuple(_curve_row(n, unit, found) for n, found in curve),
    )


def _value(
    number: int, unit: str, found: Plan | RingfxError, plan: Plan, amount: float | None
) -> Value:
    is_here = isinstance(found, Plan) and (found.world_size, found.axes, found.layers) == (
        plan.world_size,
        plan.axes,
        plan.layers,
    )
    label = format_tokens(number) if unit == "tokens" else f"{number:,}"
    return Value(
        at=number, label=label, amount=amount, is_here=is_here, fits=isinstance(found, Plan)
    )


def _time(found: Plan | RingfxError, is_whole: bool) -> float | None:
    if not isinstance(found, Plan):
        return None
    return found.step_ms if is_whole else found.total_ms


def _size(found: Plan | RingfxError) -> float | None:
    """Where nothing fits, what is needed at least."""
    if isinstance(found, Plan):
        return memory_bytes(found)
    known = isinstance(found, OutOfMemory) and found.shortfall
    return known.needed if known else None


def _curve_row(number: int, unit: str, found: Plan | RingfxError) -> tuple[str, ...]:
    label = f"{number:,}"
    if not isinstance(found, Plan):
        return (label, str(found).split("\n")[0], "", "")
    time = format_ms(found.step_ms or found.total_ms)
    return (label, strategy_mix(found), time, format_bytes(memory_bytes(found)))
