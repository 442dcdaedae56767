"""Other views of a plan: one layer with all its strategies, two plans, many plans."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from ringfx.cost_model.choice.candidates import Candidates, candidates
from ringfx.cost_model.choice.whatif import Change, tokens
from ringfx.cost_model.prediction.predict import Prediction
from ringfx.cost_model.prediction.profile import Profile
from ringfx.errors import RingfxError
from ringfx.ir.folding import FoldedLayers, fold
from ringfx.ir.plan import LayerPlan, Plan
from ringfx.strategies import SPLIT_KV, STRATEGIES, Strategy
from ringfx.units.columns import WIDTH, bar, table_lines, wrapped
from ringfx.units.format import format_budget, format_bytes, format_ms

__all__ = ["diff_text", "strategy_options_text", "sweep_text"]


# --- one layer --------------------------------------------------------------------------------


def strategy_options_text(
    plan: Plan,
    pattern: str,
    profile: Profile,
    strategies: Mapping[str, Strategy] = STRATEGIES,
) -> str:
    """Compare all strategies for the layers that a glob matches: numbers, or why one cannot run.

    Raises
    ------
    InvalidArgument
        No layer has such a name.
    """
    found = [layer for layer in plan.layers if fnmatchcase(layer.name, pattern)]
    if not found:
        plan.layer(pattern)
    return "\n\n".join(_explained(group, plan, profile, strategies) for group in fold(found))


def _explained(
    group: FoldedLayers, plan: Plan, profile: Profile, strategies: Mapping[str, Strategy]
) -> str:
    layer = group.layers[0]
    ranks = 1 if layer.is_replicated else plan.world_size
    more = layer.head_groups
    if layer.strategy == SPLIT_KV.name:
        strategies = {SPLIT_KV.name: SPLIT_KV}
    offer = candidates(layer.site, ranks, profile, strategies, more_groups=more)
    times = [_TIME_TITLES, *(_times(option, layer) for option in offer.options)]
    sizes = [_SIZE_TITLES, *(_sizes(option, layer) for option in offer.options)]
    found = f"{group.name}: {layer.mask}, {layer.site.q_len:,} tokens, {plan.world_size} ranks"
    lines = wrapped([found])
    lines += [f"  {line}" for line in table_lines(times, left=(0, 1))]
    lines += ["", *(f"  {line}" for line in table_lines(sizes, left=(0, 1, 4))), ""]
    words = [f"{name}: {strategies[name].summary}" for name in _names(offer)]
    words += [f"{name} cannot run: {no.reason}" for name, no in offer.refused.items()]
    words += [f"chosen: {layer.reason}", _noise_words(offer)]
    return "\n".join([*lines, *wrapped(words, 2)])


_TIME_TITLES = ("", "strategy", "total", "forward", "backward", "compute", "comm", "exposed")
_SIZE_TITLES = ("", "strategy", "saved", "workspace", "kernel")


def _times(option: Prediction, layer: LayerPlan) -> tuple[str, ...]:
    times = (
        option.total_ms,
        option.forward_ms,
        option.backward_ms,
        option.compute_ms,
        option.communication_ms,
        option.exposed_ms,
    )
    return (*_named(option, layer), *(format_ms(ms) for ms in times))


def _sizes(option: Prediction, layer: LayerPlan) -> tuple[str, ...]:
    sizes = (option.saved_bytes, option.workspace_bytes)
    return (*_named(option, layer), *(format_bytes(size) for size in sizes), option.kernel)


def _named(option: Prediction, layer: LayerPlan) -> tuple[str, str]:
    groups = f" in {option.head_groups}" if option.head_groups else ""
    return ("*" if _is_of(option, layer) else "", option.strategy + groups)


def _is_of(option: Prediction, layer: LayerPlan) -> bool:
    return (option.strategy, option.head_groups) == (layer.strategy, layer.head_groups)


def _names(offer: Candidates) -> list[str]:
    return list(dict.fromkeys(option.strategy for option in offer.options))


def _noise_words(offer: Candidates) -> str:
    if offer.noise <= 1:
        return "the profile does not say how much repeated measurements differ"
    return f"times that differ by less than {offer.noise - 1:.0%} are ties"


# --- two plans ----------------------------------------------------------------------------------


def diff_text(before: Plan, after: Plan) -> str:
    """The differences of two plans; a sentence if there are none."""
    lines = [*_setting_changes(before, after), *_layer_changes(before, after)]
    if not lines:
        return "the plans are equal"
    return "\n".join(wrapped([*lines, *_total_changes(before, after)]))


def _setting_changes(before: Plan, after: Plan) -> Iterator[str]:
    settings: Mapping[str, tuple[object, object]] = {
        "ranks": (before.world_size, after.world_size),
        "tokens": (f"{tokens(before):,}", f"{tokens(after):,}"),
        "device": (before.device, after.device),
        "profile": (before.profile, after.profile),
        "budget": (_budget(before), _budget(after)),
    }
    for name, (old, new) in settings.items():
        if old != new:
            yield f"{name}: {old} -> {new}"


def _budget(plan: Plan) -> str:
    return "none" if plan.gpu_memory is None else format_budget(plan.gpu_memory)


def _layer_changes(before: Plan, after: Plan) -> Iterator[str]:
    old = {layer.name: layer for layer in before.layers}
    new = {layer.name: layer for layer in after.layers}
    for group in fold(after.layers):
        previous = [old[layer.name] for layer in group.layers if layer.name in old]
        if not previous:
            yield f"{group.name}: only in the second plan, {group.layers[0].strategy}"
        elif line := _layer_change(group, previous):
            yield line
    for group in fold([layer for layer in before.layers if layer.name not in new]):
        yield f"{group.name}: only in the first plan, {group.layers[0].strategy}"


def _layer_change(group: FoldedLayers, previous: Sequence[LayerPlan]) -> str:
    layer, old = group.layers[0], previous[0]
    strategies = "/".join(dict.fromkeys(x.strategy for x in previous))
    if strategies == layer.strategy:
        strategy = layer.strategy
    else:
        strategy = f"{strategies} -> {layer.strategy}"
    times = (format_ms(old.total_ms), format_ms(layer.total_ms))
    kernels = "/".join(dict.fromkeys(x.kernel for x in previous))
    is_other = kernels != layer.kernel
    if strategies == layer.strategy and times[0] == times[1] and not is_other:
        return ""
    kernel = f", {kernels} -> {layer.kernel}" if is_other else ""
    return f"{group.name}: {strategy}{kernel}, {times[0]} -> {times[1]}"


def _total_changes(before: Plan, after: Plan) -> Iterator[str]:
    old, new = before.total_ms, after.total_ms
    change = f" ({100 * (new / old - 1):+.0f}%)" if old else ""
    yield f"attention a step: {format_ms(old)} -> {format_ms(new)}{change}"
    yield (
        f"attention's memory: {format_bytes(attention_bytes(before))}"
        f" -> {format_bytes(attention_bytes(after))}"
    )
    if before.memory.parts and after.memory.parts:
        yield (
            f"memory of one rank: {format_bytes(before.memory.peak_bytes)}"
            f" -> {format_bytes(after.memory.peak_bytes)}"
        )


def attention_bytes(plan: Plan) -> int:
    """All that attention saves, and the largest workspace."""
    return plan.saved_bytes + plan.workspace_bytes


def memory_bytes(plan: Plan) -> int:
    """The peak of one rank; where only attention is known, what that needs."""
    return plan.memory.peak_bytes or attention_bytes(plan)


# --- many plans ---------------------------------------------------------------------------------


def sweep_text(name: str, changes: Sequence[Change], results: Sequence[Plan | RingfxError]) -> str:
    """One line a value: strategies, time, memory, a bar of time; or why there is no plan."""
    rows: list[tuple[str, ...]] = [(name, "strategies", "attention", "exposed", "memory")]
    failed, times = [], [0.0]
    for change, result in zip(changes, results, strict=True):
        value = change_words(change)
        if isinstance(result, Plan):
            exposed = sum(layer.exposed_ms for layer in result.layers)
            rows.append(
                (
                    value,
                    strategy_mix(result),
                    format_ms(result.total_ms),
                    format_ms(exposed),
                    format_bytes(memory_bytes(result)),
                )
            )
            times.append(result.total_ms)
        else:
            rows.append((value, "none", "", "", ""))
            failed.append(f"{value}: {str(result).split(chr(10))[0]}")
            times.append(0.0)
    return "\n".join([*_with_bars(table_lines(rows, left=(0, 1)), times), *wrapped(failed)])


def _with_bars(lines: Sequence[str], times: Sequence[float]) -> Iterator[str]:
    """As long as the times, in the columns that are left."""
    longest, start = max(times), max(map(len, lines)) + 2
    for line, ms in zip(lines, times, strict=True):
        is_shown = ms and start < WIDTH
        length = bar(ms / longest, min(BAR_WIDTH, WIDTH - start)) if is_shown else ""
        yield f"{line:{start}}{length}".rstrip()


BAR_WIDTH = 24
"""At most."""


def change_words(change: Change) -> str:
    """The value of a change of one thing."""
    if change.seq_len is not None:
        return f"{change.seq_len:,}"
    if change.gpu_memory is not None:
        return format_budget(change.gpu_memory)
    if change.link_bytes_per_s is not None:
        return f"{change.link_bytes_per_s / 1e9:g} GB/s"
    return str(change.world_size or change.latency_us)


def strategy_mix(plan: Plan) -> str:
    """Such as ``24 x production, 8 x ulysses``."""
    counts: dict[str, int] = {}
    for layer in plan.layers:
        counts[layer.strategy] = counts.get(layer.strategy, 0) + 1
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{count} x {name}" for name, count in counts.items())
