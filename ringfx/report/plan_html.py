"""A plan as one self-contained page: tables, bars and curves, no script and no other file.

Charts are inline SVG made here, so that the page prints, mails and archives as it is shown. Colours
come from one palette with enough contrast on both light and dark ground.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from math import log10
from typing import TypeAlias

from ringfx.errors import RingfxError
from ringfx.ir.memory_plan import MemoryPart
from ringfx.ir.note import texts_of
from ringfx.ir.plan import Plan
from ringfx.ir.plan_text import (
    FoldedLayers,
    answer_lines,
    fold,
    kernel_words,
    reason_words,
    step_lines,
)
from ringfx.ir.values import CommKind
from ringfx.report.plan_views import attention_bytes, memory_bytes, strategy_mix
from ringfx.units.age import age_words
from ringfx.units.format import format_bytes, format_ms

__all__ = ["to_html"]

WIDTH, BAR_HEIGHT, LABEL_WIDTH = 760, 22, 260
PLOT_HEIGHT, MARGIN = 260, 60
COLOURS = ("#3b6ea5", "#d1603d", "#5a9367", "#8f6bb3", "#c9a227", "#4f5d75", "#b5446e")

STYLE = """
:root { color-scheme: light dark; --line: #8884; --quiet: #777 }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 860px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2.2rem }
table { border-collapse: collapse; width: 100%; font-size: 14px }
th, td { padding: .3rem .5rem; border-bottom: 1px solid var(--line); text-align: right }
td { white-space: nowrap } td:first-child, td.text { white-space: normal; overflow-wrap: anywhere }
th:first-child, td:first-child, .text { text-align: left }
small, .quiet { color: var(--quiet) }
svg { width: 100%; height: auto } svg text { font: 12px system-ui, sans-serif; fill: currentColor }
.axis { stroke: currentColor; stroke-width: .5 }
"""


Curve: TypeAlias = Sequence[tuple[int, Plan | RingfxError]]


def to_html(plan: Plan, lengths: Curve = (), ranks: Curve = ()) -> str:
    """The page of a plan.

    Parameters
    ----------
    lengths, ranks
        The same model at other lengths, and over other numbers of ranks: the number, and the plan
        or why there is none.
    """
    title = f"ringfx plan for {plan.world_size} ranks on {plan.device}"
    sections = [
        _header(plan, title),
        _list("Time of one step on one rank", step_lines(plan)),
        _layers(plan),
        _time_chart(plan),
        _memory(plan),
        _memory_over_program(plan),
        _curves(lengths, "Other sequence lengths", "tokens"),
        _curves(ranks, "Other numbers of ranks", "ranks"),
        _list("Outside attention", _moves(plan)),
        _list(
            "Attention-like regions not parallelized",
            [f"{d.name} ({d.source}): {d.reason}" for d in plan.declined],
        ),
        _list("Notes", texts_of(plan.notes)),
    ]
    body = "\n".join(section for section in sections if section)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}'
        '</title>\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


# --- text and tables ----------------------------------------------------------------------------


def _header(plan: Plan, title: str) -> str:
    axes = [
        f"{axis.length:,} tokens ({axis.axis}): {axis.local_length:,} on each rank, {axis.layout}"
        for axis in plan.axes
    ]
    age = age_words(plan.profile_date)
    lines = [
        *axes,
        plan.found_words,
        f"predicted with profile {plan.profile}, {age}: {plan.profile_origin}",
    ]
    total = (
        f"{len(plan.layers)} attention calls: {format_ms(plan.total_ms)} a step on each rank,"
        f" {format_bytes(attention_bytes(plan))} of memory"
    )
    quiet = "<br>".join(map(escape, lines))
    if plan.unsplit_words:
        total = f"{plan.unsplit_words}. {total}"
    answer = "<br>".join(map(escape, answer_lines(plan)))
    first = f"<p><b>{answer}</b></p>\n" if answer else ""
    return f"<h1>{escape(title)}</h1>\n{first}<p>{escape(total)}</p>\n<p class=quiet>{quiet}</p>"


def _layers(plan: Plan) -> str:
    head = "<tr><th>attention<th class=text>strategy<th>compute<th>comm<th>exposed<th>total"
    rows = "\n".join(_layer_row(group) for group in fold(plan.layers))
    return f"<h2>Layers</h2>\n<table>\n{head}<th>saved</tr>\n{rows}\n</table>"


def _layer_row(group: FoldedLayers) -> str:
    layer = group.layers[0]
    times = (layer.compute_ms, layer.communication_ms, layer.exposed_ms, layer.total_ms)
    cells = "".join(f"<td>{format_ms(ms)}" for ms in times)
    count = f"{len(group.layers)} x " if len(group.layers) > 1 else ""
    found = f"{count}{layer.mask}; {kernel_words(layer)}; {layer.found_by} at {layer.source}"
    found += f"; split along {layer.axis}" if layer.axis else ""
    return (
        f"<tr><td><b>{escape(group.name)}</b><br><small>{escape(found)}</small>"
        f"<td class=text>{escape(layer.strategy)}<br><small>{escape(reason_words(layer))}</small>"
        f"{cells}<td>{format_bytes(layer.saved_bytes)}</tr>"
    )


def _list(title: str, items: Iterable[str]) -> str:
    found = "\n".join(f"<li>{escape(item)}</li>" for item in items)
    return f"<h2>{title}</h2>\n<ul>\n{found}\n</ul>" if found else ""


def _moves(plan: Plan) -> list[str]:
    return [
        f"{move.kind}, {format_bytes(move.bytes_moved)} at {move.name} ({move.source}):"
        f" {move.reason}"
        for move in sorted(
            plan.collectives, key=lambda m: (m.kind != CommKind.ALL_GATHER, -m.bytes_moved)
        )
    ]


# --- bars ---------------------------------------------------------------------------------------


def _time_chart(plan: Plan) -> str:
    """Each group of layers: compute, and the messages that nothing hides."""
    groups = fold(plan.layers)
    rows = []
    for group in groups:
        compute = sum(layer.compute_ms for layer in group.layers)
        exposed = sum(layer.exposed_ms for layer in group.layers)
        words = f"{format_ms(compute + exposed)}"
        rows.append((group.name, ((compute, COLOURS[0]), (exposed, COLOURS[1])), words))
    legend = _legend((("compute", COLOURS[0]), ("exposed communication", COLOURS[1])))
    return f"<h2>Time of attention by layer</h2>\n{_bars(rows)}\n{legend}" if rows else ""


def _memory(plan: Plan) -> str:
    parts = sorted(plan.memory.parts, key=lambda part: -part.bytes)
    if not parts:
        return ""
    budget = "" if plan.gpu_memory is None else f" of {format_bytes(plan.gpu_memory)}"
    rows = [_memory_row(part, i) for i, part in enumerate(parts)]
    unknown = "".join(f"<p class=quiet>not counted: {escape(x)}</p>" for x in plan.memory.unknown)
    peak = format_bytes(plan.memory.peak_bytes)
    return f"<h2>Memory of one rank at the peak: {peak}{budget}</h2>\n{_bars(rows)}\n{unknown}"


def _memory_over_program(plan: Plan) -> str:
    """Bars from the program's start to its end, the peak in another colour."""
    sizes = plan.memory.over_program
    if not sizes:
        return ""
    peak, step = max(sizes), WIDTH / len(sizes)
    bars = "\n".join(
        f'<rect x="{i * step:.1f}" y="{PLOT_HEIGHT * (1 - size / peak):.1f}" width="{step - 1:.1f}"'
        f' height="{PLOT_HEIGHT * size / peak:.1f}" fill="{COLOURS[1 if size == peak else 2]}"/>'
        for i, size in enumerate(sizes)
    )
    when = " when the backward pass reaches it (right to left)" if plan.trains else ""
    words = (
        f"From the first operator to the last: bytes alive on one rank{when};"
        f" {format_bytes(peak)} at most."
    )
    return (
        f"<h2>Memory over the program</h2>\n<p class=quiet>{escape(words)}</p>\n"
        f'<svg viewBox="0 0 {WIDTH} {PLOT_HEIGHT}" role="img">\n{bars}\n</svg>'
    )


def _memory_row(part: MemoryPart, index: int) -> tuple[str, tuple[tuple[float, str], ...], str]:
    colour = COLOURS[index % len(COLOURS)]
    return part.cause, ((part.bytes, colour),), format_bytes(part.bytes)


def _bars(rows: Sequence[tuple[str, Sequence[tuple[float, str]], str]]) -> str:
    """Horizontal stacked bars: label, (value, colour) parts, words at the end."""
    longest = max((sum(value for value, _ in parts) for _, parts, _ in rows), default=0) or 1
    scale = (WIDTH - LABEL_WIDTH - 90) / longest
    lines = []
    for i, (label, parts, words) in enumerate(rows):
        y, x = i * BAR_HEIGHT, float(LABEL_WIDTH)
        lines.append(f'<text x="0" y="{y + 15}">{escape(_short(label))}</text>')
        for value, colour in parts:
            width = value * scale
            lines.append(
                f'<rect x="{x:.1f}" y="{y + 4}" width="{width:.1f}" height="{BAR_HEIGHT - 8}"'
                f' fill="{colour}"/>'
            )
            x += width
        lines.append(f'<text x="{x + 6:.1f}" y="{y + 15}">{escape(words)}</text>')
    height = max(1, len(rows)) * BAR_HEIGHT
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img">\n' + "\n".join(lines) + "\n</svg>"


def _short(label: str, length: int = 38) -> str:
    """The end of a module path says more than its start."""
    return label if len(label) <= length else "…" + label[-(length - 1) :]


def _legend(items: Iterable[tuple[str, str]]) -> str:
    return (
        "<p class=quiet>"
        + " &nbsp; ".join(
            f'<span style="color:{colour}">■</span> {escape(name)}' for name, colour in items
        )
        + "</p>"
    )


# --- curves -------------------------------------------------------------------------------------


def _curves(curves: Curve, title: str, unit: str) -> str:
    """Time and memory over what is changed, both axes logarithmic, and a table beneath."""
    plans = [(tokens, found) for tokens, found in curves if isinstance(found, Plan)]
    if len(plans) < 2:
        return ""
    is_whole = all(found.step_ms for _, found in plans)
    times = [(n, (is_whole and found.step_ms) or found.total_ms) for n, found in plans]
    sizes = [(tokens, float(memory_bytes(found))) for tokens, found in plans]
    charts = (
        f"<p>{'Time' if is_whole else 'Attention'} of one step</p>\n"
        f"{_plot(times, format_ms, COLOURS[0])}\n"
        f"<p>Memory of one rank</p>\n{_plot(sizes, format_bytes, COLOURS[2])}"
    )
    rows = "\n".join(_curve_row(tokens, found) for tokens, found in curves)
    head = f"<tr><th>{unit}<th class=text>strategies<th>time<th>memory</tr>"
    return f"<h2>{title}</h2>\n{charts}\n<table>\n{head}\n{rows}\n</table>"


def _curve_row(tokens: int, found: Plan | RingfxError) -> str:
    if not isinstance(found, Plan):
        why = escape(str(found).split("\n")[0])
        return f"<tr><td>{tokens:,}<td class=text colspan=3>{why}</tr>"
    return (
        f"<tr><td>{tokens:,}<td class=text>{escape(strategy_mix(found))}"
        f"<td>{format_ms(found.step_ms or found.total_ms)}"
        f"<td>{format_bytes(memory_bytes(found))}</tr>"
    )


def _plot(points: Sequence[tuple[int, float]], words: Callable[[float], str], colour: str) -> str:
    """A line with a mark and its value at every point."""
    xs = _positions([float(x) for x, _ in points], MARGIN, WIDTH - MARGIN)
    ys = _positions([y for _, y in points], PLOT_HEIGHT - 40, 30)
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
    marks = [
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>'
        f'<text x="{x:.1f}" y="{y - 9:.1f}" text-anchor="middle">{escape(words(value))}</text>'
        f'<text x="{x:.1f}" y="{PLOT_HEIGHT - 12}" text-anchor="middle">{tokens:,}</text>'
        for x, y, (tokens, value) in zip(xs, ys, points, strict=True)
    ]
    base, left, right = PLOT_HEIGHT - 30, MARGIN // 2, WIDTH - MARGIN // 2
    return (
        f'<svg viewBox="0 0 {WIDTH} {PLOT_HEIGHT}" role="img">\n'
        f'<line class="axis" x1="{left}" x2="{right}" y1="{base}" y2="{base}"/>\n'
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>\n'
        + "\n".join(marks)
        + "\n</svg>"
    )


def _positions(values: Sequence[float], start: float, stop: float) -> list[float]:
    """Where values lie between start and stop on a logarithmic axis."""
    logs = [log10(max(value, 1e-9)) for value in values]
    low, high = min(logs), max(logs)
    return [
        start + (stop - start) * ((x - low) / (high - low) if high > low else 0.5) for x in logs
    ]
