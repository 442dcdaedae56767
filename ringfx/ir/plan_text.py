"""A plan as a person reads it: tables for a terminal, the same as plain text elsewhere."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from ringfx.ir.memory_plan import MemoryPlan
from ringfx.ir.note import texts_of
from ringfx.ir.plan import LayerPlan, Plan
from ringfx.ir.step_time import AGAIN
from ringfx.ir.values import Collective, CommKind, Declined, InChunks
from ringfx.units.age import age_words
from ringfx.units.format import format_bytes, format_ms, index_set

__all__ = [
    "TEXT_WIDTH",
    "FoldedLayers",
    "fold",
    "fold_names",
    "kernel_words",
    "reason_words",
    "render",
    "table_lines",
    "to_text",
]

TEXT_WIDTH = 120
"""Columns of plain text: fixed, so that the same plan is the same text everywhere."""


def to_text(shown: object) -> str:
    """A plan, or what else prints itself, as plain text without colours."""
    console = Console(
        file=io.StringIO(), width=TEXT_WIDTH, no_color=True, force_terminal=False, highlight=False
    )
    console.print(render(shown) if isinstance(shown, Plan) else shown)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().rstrip().split("\n"))


def render(plan: Plan) -> RenderableType:
    """Header, table of layers, totals, what else moves, memory and notes, in this order."""
    parts: list[RenderableType] = [_header(plan), _layer_table(plan), _totals(plan)]
    parts += _section(_step_title(plan), step_lines(plan))
    parts += _section(_moves_title(plan), _moves(plan.collectives))
    parts += _section("in chunks of tokens", _chunk_lines(plan.chunks))
    parts += _section("looks like attention, not recognised", _near(plan.missed))
    parts += _section("attention-like regions not parallelized", _near(plan.declined))
    if plan.memory.parts:
        parts += _section(_memory_title(plan), _memory_lines(plan.memory))
        parts += _section("by block of the model", _block_lines(plan.memory))
    parts += _section("notes", texts_of(plan.notes))
    return Group(*parts)


# --- folding equal layers -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FoldedLayers:
    """Layers that are equal in all but one number of their module path."""

    name: str
    layers: tuple[LayerPlan, ...]


def fold(layers: Sequence[LayerPlan]) -> tuple[FoldedLayers, ...]:
    """Group equal layers as ``model.layers.{0..31}.self_attn``, in order of first appearance."""
    alike: dict[object, list[LayerPlan]] = {}
    for layer in layers:
        alike.setdefault((_template(layer.name), _appearance(layer)), []).append(layer)
    groups = [group for members in alike.values() for group in _fold_alike(members)]
    position = {id(layer): i for i, layer in enumerate(layers)}
    return tuple(sorted(groups, key=lambda group: position[id(group.layers[0])]))


def _template(name: str) -> tuple[str, ...]:
    """What stands around the numbers of a name."""
    return tuple(re.split(r"\d+", name))


def _numbers(name: str) -> tuple[int, ...]:
    return tuple(int(text) for text in re.findall(r"\d+", name))


def _appearance(layer: LayerPlan) -> tuple[object, ...]:
    """All that a row of the table shows, times as they print."""
    times = (layer.compute_ms, layer.communication_ms, layer.exposed_ms, layer.total_ms)
    shown = tuple(format_ms(ms) for ms in times)
    return (*_identity(layer), *shown, format_bytes(layer.saved_bytes))


def _identity(layer: LayerPlan) -> tuple[object, ...]:
    words = (layer.source, layer.found_by, _attention_words(layer), layer.strategy, layer.reason)
    return (
        *words,
        layer.axis,
        bool(layer.site.checkpoint),
        layer.recomputed,
        layer.attention_again,
        layer.offloaded,
    )


def _fold_alike(members: Sequence[LayerPlan]) -> Iterator[FoldedLayers]:
    """Members of one template, folded along the last number that varies."""
    for name, places in fold_names([layer.name for layer in members]):
        yield FoldedLayers(name=name, layers=tuple(members[i] for i in places))


def fold_names(names: Sequence[str]) -> Iterator[tuple[str, list[int]]]:
    """Names that differ in one number as one, with their positions; other numbers stay apart.

    >>> list(fold_names(["a.0", "a.1", "b"]))
    [('a.{0,1}', [0, 1]), ('b', [2])]
    """
    alike: dict[tuple[str, ...], list[int]] = {}
    for i, name in enumerate(names):
        alike.setdefault(_template(name), []).append(i)
    for places in alike.values():
        numbers = [_numbers(names[i]) for i in places]
        varying = [d for d, column in enumerate(zip(*numbers, strict=True)) if len(set(column)) > 1]
        if not varying:
            yield names[places[0]], places
            continue
        along = varying[-1]
        rows: dict[tuple[int, ...], list[int]] = {}
        for i, row in zip(places, numbers, strict=True):
            rows.setdefault((*row[:along], *row[along + 1 :]), []).append(i)
        for group in rows.values():
            yield _folded_name([names[i] for i in group], along), group


def _folded_name(names: Sequence[str], along: int) -> str:
    indices = sorted({_numbers(name)[along] for name in names})
    words: list[str] = [str(number) for number in _numbers(names[0])]
    words[along] = index_set(indices)
    remaining = iter(words)
    return re.sub(r"\d+", lambda _: next(remaining), names[0])


# --- the parts ------------------------------------------------------------------------------------


def _header(plan: Plan) -> RenderableType:
    ranks = f"{plan.world_size} rank" + ("s" if plan.world_size != 1 else "")
    first = Text.assemble(("ringfx plan", "bold"), f" for {ranks} on {plan.device}", _mode(plan))
    lines = [first]
    for axis in plan.axes:
        lines.append(
            Text(
                f"  {axis.length:,} tokens ({axis.axis}): {axis.local_length:,} on each rank,"
                f" {axis.layout}"
            )
        )
    lines += [Text(f"  {line}", "bold") for line in answer_lines(plan)]
    alarming = bool(plan.missed or plan.replicated_layers)
    lines.append(Text(f"  {plan.found_words}", "bold red" if alarming else ""))
    if plan.unsplit_words:
        lines.append(Text(f"  {plan.unsplit_words}", "bold red"))
    age = age_words(plan.profile_date)
    lines.append(
        Text(f"  predicted with profile {plan.profile}, {age}: {plan.profile_origin}", "dim")
    )
    return Group(*lines)


def answer_lines(plan: Plan) -> list[str]:
    """Whether it fits and how long a step takes, then what is given up for it."""
    found = []
    peak, budget = plan.memory.peak_bytes, plan.gpu_memory
    if peak:
        fits = "" if budget is None else f"fits {format_bytes(budget)}: "
        found.append(f"{fits}{format_bytes(peak)} of memory at the peak{_optimizer_words(plan)}")
    if plan.step is not None and plan.step_ms:
        seconds = plan.step_ms / 1e3
        rate = f"{plan.step.tokens / seconds:,.0f} tokens a second"
        share = ""
        if plan.step.peak_gflops:
            share = (
                f", {plan.step.gflops / seconds / plan.step.peak_gflops:.0%} of the device's peak"
            )
        found.append(f"{format_ms(plan.step_ms)} a step, {rate}{share}")
    again = [layer for layer in plan.layers if layer.recomputed]
    if again:
        found.append(
            f"{len(again)} of {len(plan.layers)} layers are computed again in backward,"
            f" {_attention_again(again)}: {format_ms(plan.again_ms)}"
        )
    moved = [layer for layer in plan.layers if layer.offloaded]
    if moved:
        size = format_bytes(sum(layer.host_bytes for layer in moved))
        found.append(
            f"what {len(moved)} of them keep waits in the host's memory, {size} of each rank:"
            f" {format_ms(plan.offload_ms)}"
        )
    return found


def _attention_again(layers: Sequence[LayerPlan]) -> str:
    count = sum(layer.attention_again for layer in layers)
    if not count:
        return "attention apart"
    return "attention too" if count == len(layers) else f"of {count} attention too"


def _optimizer_words(plan: Plan) -> str:
    if not plan.trains or not plan.optimizer:
        return ""
    if plan.optimizer in ("none", "0"):
        return ", without an optimizer's state (none was given)"
    named = plan.optimizer
    return f", with {f'{named} bytes a parameter' if named.isdecimal() else named}"


def _step_title(plan: Plan) -> str:
    return f"time of a step on one rank: {format_ms(plan.step_ms)}" if plan.step_ms else ""


def step_lines(plan: Plan) -> list[str]:
    """What a step's time is made of, the longest first."""
    if plan.step is None or not plan.step_ms:
        return []
    layers = plan.layers
    parts = {part.cause: plan.step.of(part.cause) for part in plan.step.parts}
    parts["attention"] = sum(x.compute_ms for x in layers)
    parts["attention's messages that nothing hides"] = sum(x.exposed_ms for x in layers)
    parts["other messages that nothing hides"] = max(0.0, plan.outside_ms - plan.hidden_ms)
    parts[AGAIN] = parts.get(AGAIN, 0.0) + plan.again_ms
    parts["to the host's memory and back"] = plan.offload_ms
    return [
        f"{format_ms(ms):>9}  {100 * ms / plan.step_ms:3.0f}%  {cause}"
        for cause, ms in sorted(parts.items(), key=lambda item: -item[1])
        if ms
    ]


def _mode(plan: Plan) -> str:
    return ", forward and backward" if plan.trains else ", forward only"


def _layer_table(plan: Plan) -> RenderableType:
    """One line of numbers for each group of equal layers, then what it is and why, indented."""
    groups = fold(plan.layers)
    axes = len({layer.axis for layer in plan.split_layers}) > 1
    title, *rows = table_lines([_TITLES, *map(_cells, groups)], left=(0, 2))
    lines = [Text(title, "bold"), Text("─" * max(map(len, (title, *rows))), "dim")]
    for group, row in zip(groups, rows, strict=True):
        lines.append(Text(row, "bold"))
        lines += [Text(f"    {detail}", "dim") for detail in _details(group, axes)]
    return Padding(Group(*lines), (1, 0, 0, 0))


_TITLES = ("attention", "", "strategy", "compute", "comm", "exposed", "total", "saved")


def _cells(group: FoldedLayers) -> tuple[str, ...]:
    layer, count = group.layers[0], len(group.layers)
    times = (layer.compute_ms, layer.communication_ms, layer.exposed_ms, layer.total_ms)
    return (
        group.name,
        f"{count} x" if count > 1 else "",
        layer.strategy,
        *(format_ms(ms) for ms in times),
        format_bytes(layer.saved_bytes),
    )


def table_lines(rows: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
    """Rows of cells in aligned columns; those in ``left`` are flush left, others right.

    >>> table_lines([("name", "ms"), ("a", "12.5"), ("long", "3")], left=(0,))
    ['name    ms', 'a     12.5', 'long     3']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _details(group: FoldedLayers, names_axis: bool) -> Iterator[str]:
    layer = group.layers[0]
    yield _attention_words(layer)
    again = "; checkpointed: its inputs are recomputed" if layer.site.checkpoint else ""
    yield f"found as {layer.found_by} at {_short_source(layer.source)}{again}"
    yield reason_words(layer)
    if layer.recomputed:
        words = _attention_again([layer])
        yield f"computed again in backward, {words}: {format_ms(layer.again_ms)}"
    if layer.offloaded:
        size = format_bytes(layer.host_bytes)
        yield f"{size} of it wait in the host's memory: {format_ms(layer.offload_ms)}"
    if names_axis and layer.axis:
        yield f"split along {layer.axis}"


def reason_words(layer: LayerPlan) -> str:
    """Why this strategy, with its gloss; a layer that is not split has a reason only."""
    return layer.reason if layer.is_replicated else f"{layer.strategy_words}: {layer.reason}"


def _attention_words(layer: LayerPlan) -> str:
    site = layer.site
    heads = f"{site.heads}" if site.heads == site.kv_heads else f"{site.heads}/{site.kv_heads}"
    same_dims = site.head_dim == site.v_head_dim
    dims = f"{site.head_dim}" if same_dims else f"{site.head_dim}/{site.v_head_dim}"
    tokens = f"{site.q_len:,}" if site.q_len == site.kv_len else f"{site.q_len:,} x {site.kv_len:,}"
    batch = f"{site.batch} x " if site.batch != 1 else ""
    return (
        f"{layer.mask}; {batch}{tokens} tokens, {heads} heads of {dims}, {site.dtype};"
        f" {kernel_words(layer)}"
    )


def kernel_words(layer: LayerPlan) -> str:
    """Such as ``cuda_flash kernel``."""
    is_one = layer.kernel.isidentifier()
    return f"{layer.kernel} kernel" if is_one else f"kernels: {layer.kernel}"


def _short_source(source: str) -> str:
    """The last two parts of a path: enough to recognise, short enough for a table.

    >>> _short_source("/usr/lib/models/llama/modeling_llama.py:254")
    'llama/modeling_llama.py:254'
    """
    return "/".join(source.split("/")[-2:])


def _totals(plan: Plan) -> RenderableType:
    layers = plan.layers
    compute, exposed = sum(x.compute_ms for x in layers), sum(x.exposed_ms for x in layers)
    text = Text.assemble(
        (f"{len(layers)} attention calls: {format_ms(plan.total_ms)} a step", "bold"),
        f" on each rank ({format_ms(compute)} compute, {format_ms(exposed)} exposed "
        f"communication); {format_bytes(plan.saved_bytes)} saved for backward, up to "
        f"{format_bytes(plan.workspace_bytes)} of workspace",
    )
    return Padding(text, (1, 0, 0, 0))


def _section(title: str, lines: Sequence[str]) -> list[RenderableType]:
    if not lines:
        return []
    body = Text("\n".join(lines))
    return [Padding(Text(title, "bold"), (1, 0, 0, 0)), Padding(body, (0, 0, 0, 2))]


def _moves_title(plan: Plan) -> str:
    count, size = plan.num_collectives, format_bytes(plan.collective_bytes)
    time = f", {format_ms(plan.outside_ms)} if not overlapped" if plan.outside_ms else ""
    if plan.hidden_ms:
        time += f", at least {format_ms(plan.hidden_ms)} of it under attention's compute"
    return f"outside attention: {count} collective{'' if count == 1 else 's'} a step, {size}{time}"


def _moves(moves: Sequence[Collective]) -> list[str]:
    """Gathers first, since they are what a reader wants to remove; equal ones together."""
    alike: dict[tuple[object, ...], list[Collective]] = {}
    for move in sorted(moves, key=lambda m: (m.kind != CommKind.ALL_GATHER, -m.bytes_moved)):
        key = (move.kind, move.in_backward, move.reason, move.bytes_moved, move.source)
        alike.setdefault(key, []).append(move)
    return [
        _move_line(name, [group[i] for i in places])
        for group in alike.values()
        for name, places in fold_names([move.name for move in group])
    ]


def _move_line(name: str, group: Sequence[Collective]) -> str:
    """``name``: that of all of them."""
    move = group[0]
    count = f"{len(group)} x " if len(group) > 1 else ""
    size = f", {format_bytes(move.bytes_moved)}" + (" each" if len(group) > 1 else "")
    where = f" at {name}" if name else ""
    source = f" ({_short_source(move.source)})" if move.source else ""
    kind = move.kind + (" in backward" if move.in_backward else "")
    return f"{count}{kind}{size if move.bytes_moved else ''}{where}{source}: {move.reason}"


def _chunk_lines(chunks: Sequence[InChunks]) -> list[str]:
    """Equal parts of equal layers together."""
    alike: dict[object, list[InChunks]] = {}
    for x in chunks:
        key = (x.tokens, x.count, x.bytes, x.gradients, x.deferred)
        alike.setdefault(key, []).append(x)
    return [
        _chunk_line(name, members[places[0]])
        for members in alike.values()
        for name, places in fold_names([x.name for x in members])
    ]


_GRADIENTS = {
    "with it": ", its gradients computed with it",
    "again": ", computed again in backward",
    "none": "",
}


def _chunk_line(name: str, x: InChunks) -> str:
    later = ", what the model returns of it computed when it is touched" if x.deferred else ""
    return (
        f"{name or 'top level'} ({_short_source(x.source)}): {x.count} chunks of {x.tokens:,} "
        f"tokens, {format_bytes(x.bytes)} wide{_GRADIENTS[x.gradients]}{later}"
    )


def _near(declined: Sequence[Declined]) -> list[str]:
    return [f"{d.name} ({_short_source(d.source)}): {d.reason}" for d in declined]


def _memory_title(plan: Plan) -> str:
    peak, budget = plan.memory.peak_bytes, plan.gpu_memory
    title = f"memory of one rank: {format_bytes(peak)} at the peak"
    if budget is None:
        return f"{title} (no budget given)"
    return f"{title}, {100 * peak / budget:.0f}% of {format_bytes(budget)}"


MOST_BLOCKS = 12


def _block_lines(memory: MemoryPlan) -> list[str]:
    """Equal blocks together, the largest first; the smallest of many as one line."""
    alike: dict[tuple[tuple[str, ...], int], list[str]] = {}
    for name, size in memory.by_block:
        alike.setdefault((_template(name), size), []).append(name)
    groups = sorted(alike.items(), key=lambda item: -item[0][1] * len(item[1]))
    lines = [
        f"{format_bytes(size * len(names)):>9}  {_blocks_name(names)}"
        + (f", {format_bytes(size)} each" if len(names) > 1 else "")
        for (_, size), names in groups[:MOST_BLOCKS]
    ]
    rest = sum(size * len(names) for (_, size), names in groups[MOST_BLOCKS:])
    return lines + ([f"{format_bytes(rest):>9}  elsewhere"] if rest else [])


def _blocks_name(names: Sequence[str]) -> str:
    """``model.layers.{0..3}``: blocks differ in their last number."""
    if len(names) == 1:
        return names[0]
    numbers = sorted(_numbers(name)[-1] for name in names)
    head, _, tail = names[0].rpartition(str(_numbers(names[0])[-1]))
    return f"{head}{index_set(numbers)}{tail}"


def _memory_lines(memory: MemoryPlan) -> list[str]:
    peak = max(memory.peak_bytes, 1)
    lines = [
        f"{format_bytes(part.bytes):>9}  {100 * part.bytes / peak:3.0f}%  {part.cause}"
        + (f" ({part.detail})" if part.detail else "")
        for part in sorted(memory.parts, key=lambda part: -part.bytes)
    ]
    return lines + [f"not counted: {cause}" for cause in memory.unknown]
