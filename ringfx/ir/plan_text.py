"""A plan as a person reads it in a terminal of 80 columns: the answer first, then the rest."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence

from rich.console import Console, Group, RenderableType
from rich.text import Text

from ringfx.ir.folding import FoldedLayers, fold, fold_moves, folded_bytes
from ringfx.ir.memory_plan import MemoryPlan
from ringfx.ir.note import texts_of
from ringfx.ir.plan import Plan
from ringfx.ir.plan_words import (
    Part,
    axis_lines,
    choice_lines,
    chunk_lines,
    fit_words,
    fits_budget,
    found_line,
    given_up_lines,
    memory_parts,
    move_line,
    near_lines,
    profile_line,
    rest_of,
    setting_words,
    site_lines,
    speed_words,
    strategy_lines,
    time_parts,
    totals_line,
)
from ringfx.units.columns import WIDTH, bar, table_lines, wrapped
from ringfx.units.format import format_budget, format_bytes, format_ms

__all__ = ["render", "to_text"]

LONGEST_LINE = 120
"""Columns of what else prints itself as plain text; a plan's own lines end at ``WIDTH``."""


def to_text(shown: object) -> str:
    """A plan, or what else prints itself, as plain text without colours."""
    console = Console(
        file=io.StringIO(), width=LONGEST_LINE, no_color=True, force_terminal=False, highlight=False
    )
    console.print(render(shown) if isinstance(shown, Plan) else shown)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().rstrip().split("\n"))


def render(plan: Plan) -> RenderableType:
    """The first screen, which answers; then layers, messages, memory and notes, in full."""
    parts = [*_answer(plan), *(_layer_table(plan) if plan.layers else ())]
    parts += _section(_step_title(plan), _part_lines(time_parts(plan)), hanging=18)
    parts += _section(_moves_title(plan), map(move_line, fold_moves(plan.collectives)))
    parts += _section("in chunks of tokens", chunk_lines(plan.chunks))
    parts += _section("attention by rows of scores", near_lines(plan.by_rows))
    parts += _section("attention by columns of scores", near_lines(plan.by_columns))
    parts += _section("attention of channels", near_lines(plan.by_channels))
    parts += _section("looks like attention, not recognised", near_lines(plan.missed))
    parts += _section("attention-like regions not parallelized", near_lines(plan.declined))
    if plan.memory.parts:
        parts += _section(_memory_title(plan), _memory_lines(plan), hanging=18)
        parts += _section("by block of the model", _block_lines(plan.memory), hanging=11)
    parts += _section("notes", texts_of(plan.notes))
    return Group(*parts)


def _lines(lines: Iterable[str], indent: int, style: str = "", hanging: int = 2) -> Iterator[Text]:
    return (Text(line, style) for line in wrapped(lines, indent, hanging))


def _section(heading: str, lines: Iterable[str], hanging: int = 2) -> list[Text]:
    found = list(lines)
    if not found:
        return []
    return [Text(), *_lines([heading], 0, "bold"), *_lines(found, 2, hanging=hanging)]


# --- the first screen -----------------------------------------------------------------------------

MOST_PARTS = 3
"""Parts of a sum on the first screen; the others are one line."""
MOST_REASONS = 2
"""Strategies of which the first screen says why."""
BAR_WIDTH = 16


def _answer(plan: Plan) -> Iterator[Text]:
    """Whether it fits, how long a step takes, and why."""
    yield Text(f"ringfx plan for {setting_words(plan)}", "bold")
    yield from _lines(axis_lines(plan), 2)
    if plan.unsplit_words:
        yield from _lines([plan.unsplit_words], 2, "bold red")
    if words := fit_words(plan):
        yield from _lines([words], 2, "bold" if fits_budget(plan) else "bold red")
        yield from _lines(_greatest(memory_parts(plan), format_bytes), 4, hanging=34)
    if words := speed_words(plan):
        yield from _lines([words], 2, "bold")
        yield from _lines(_greatest(time_parts(plan), format_ms), 4, hanging=34)
    yield from _lines(given_up_lines(plan), 2)
    alarming = bool(plan.missed or plan.replicated_layers)
    yield from _lines([found_line(plan)], 2, "bold red" if alarming else "bold")
    yield from _lines(strategy_lines(plan)[:MOST_REASONS], 4)
    yield from _lines([profile_line(plan)], 2, "dim")


def _greatest(parts: Sequence[Part], words: Callable[[float], str]) -> Iterator[str]:
    """With bars, the rest as one line; a single part says nothing that its sum does not."""
    if len(parts) < 2:
        return
    rest = rest_of(parts, MOST_PARTS, words)
    for part in parts[:MOST_PARTS] if rest else parts:
        length = bar(part.share, BAR_WIDTH)
        yield f"{part.words:>9}  {part.share:4.0%}  {length:{BAR_WIDTH}}  {part.cause}"
    if rest:
        yield f"{rest.words:>9}  {rest.share:4.0%}  {'':{BAR_WIDTH}}  {rest.cause}, listed below"


# --- layers ---------------------------------------------------------------------------------------

_TITLES = ("attention", "compute", "comm", "exposed", "total", "saved")


def _layer_table(plan: Plan) -> Iterator[Text]:
    """A line of numbers for each group of equal layers under its name, then what it is and why."""
    groups = fold(plan.layers)
    axes = len({layer.axis for layer in plan.split_layers}) > 1
    heading, *rows = table_lines([_TITLES, *map(_cells, groups)], left=(0,))
    yield Text()
    yield Text(heading, "bold")
    yield Text("─" * min(WIDTH, max(map(len, (heading, *rows)))), "dim")
    above: list[str] = []
    for group, row in zip(groups, rows, strict=True):
        yield from _lines([group.name], 0, "bold")
        yield Text(row, "bold")
        found = list(site_lines(group.layers[0]))
        yield from _lines([x for x in found if x not in above], 4, "dim")
        yield from _lines(choice_lines(group.layers[0], axes), 4, "dim")
        above = found
    yield Text()
    yield from _lines([totals_line(plan)], 0, hanging=0)


def _cells(group: FoldedLayers) -> tuple[str, ...]:
    layer, count = group.layers[0], len(group.layers)
    times = (layer.compute_ms, layer.communication_ms, layer.exposed_ms, layer.total_ms)
    return (
        f"  {count} x {layer.strategy}" if count > 1 else f"  {layer.strategy}",
        *(format_ms(ms) for ms in times),
        format_bytes(layer.saved_bytes),
    )


# --- sums and what else ---------------------------------------------------------------------------


def _step_title(plan: Plan) -> str:
    return f"time of a step on one rank: {format_ms(plan.step_ms)}" if plan.step_ms else ""


def _part_lines(parts: Sequence[Part]) -> list[str]:
    return [
        f"{part.words:>9}  {part.share:4.0%}  {part.cause}"
        + (f" ({part.detail})" if part.detail else "")
        for part in parts
    ]


def _moves_title(plan: Plan) -> str:
    count, size = plan.num_collectives, format_bytes(plan.collective_bytes)
    time = f", {format_ms(plan.outside_ms)} if not overlapped" if plan.outside_ms else ""
    if plan.hidden_ms:
        time += f", at least {format_ms(plan.hidden_ms)} of it under attention's compute"
    return f"outside attention: {count} collective{'' if count == 1 else 's'} a step, {size}{time}"


def _memory_title(plan: Plan) -> str:
    peak, budget = plan.memory.peak_bytes, plan.gpu_memory
    heading = f"memory of one rank: {format_bytes(peak)} at the peak"
    if budget is None:
        return f"{heading} (no budget given)"
    return f"{heading}, {100 * peak / budget:.0f}% of {format_budget(budget)}"


def _memory_lines(plan: Plan) -> list[str]:
    unknown = [f"not counted: {cause}" for cause in plan.memory.unknown]
    return [*_part_lines(memory_parts(plan)), *unknown]


MOST_BLOCKS = 12


def _block_lines(memory: MemoryPlan) -> list[str]:
    """Equal blocks together, the largest first; the smallest of many as one line."""
    rows = folded_bytes(memory.by_block)
    lines = [
        f"{format_bytes(size * count):>9}  {name}"
        + (f", {format_bytes(size)} each" if count > 1 else "")
        for name, size, count in rows[:MOST_BLOCKS]
    ]
    rest = sum(size * count for _, size, count in rows[MOST_BLOCKS:])
    return lines + ([f"{format_bytes(rest):>9}  elsewhere"] if rest else [])
