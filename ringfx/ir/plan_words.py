"""What a plan says, in words and in order, for a terminal and for a page alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ringfx.ir.folding import FoldedMoves, fold_names
from ringfx.ir.memory_plan import MARGIN
from ringfx.ir.plan import LayerPlan, Plan
from ringfx.ir.step_time import AGAIN
from ringfx.ir.values import Declined, InChunks
from ringfx.units.age import age_words
from ringfx.units.format import format_budget, format_bytes, format_ms

__all__ = [
    "Part", "Words", "axis_lines", "choice_lines", "chunk_lines", "fit_words", "fits_budget",
    "found_line", "given_up_lines", "leaves_no_margin", "memory_parts", "move_line", "near_lines",
    "optimizer_words", "places_words", "profile_line", "rest_of", "setting_words", "share_of_peak",
    "short_source", "site_lines", "speed_words", "strategy_lines", "time_parts",
    "tokens_per_second", "totals_line",
]  # fmt: skip

Words: TypeAlias = Callable[[float], str]
"""Says an amount with its unit."""

MOST_PLACES = 3
"""Names of places in one line; others are counted."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One cause of a sum: bytes or milliseconds."""

    cause: str
    amount: float
    words: str
    """The amount with its unit."""
    share: float
    detail: str = ""


# --- the answer -----------------------------------------------------------------------------------


def setting_words(plan: Plan) -> str:
    """Such as ``8 ranks on cuda, forward and backward``."""
    ranks = f"{plan.world_size} rank" + ("s" if plan.world_size != 1 else "")
    mode = "forward and backward" if plan.trains else "forward only"
    return f"{ranks} on {plan.device}, {mode}"


def axis_lines(plan: Plan) -> list[str]:
    """How long each axis is, and how much of it a rank has."""
    return [
        f"{x.length:,} tokens ({x.axis}): {x.local_length:,} on each rank, {x.layout}"
        for x in plan.axes
    ]


def fit_words(plan: Plan) -> str:
    """Whether it fits; empty where memory is not known."""
    peak, budget = plan.memory.peak_bytes, plan.gpu_memory
    if not peak:
        return ""
    words = f"{format_bytes(peak)} of memory at the peak{optimizer_words(plan)}"
    if budget is None:
        return words
    if not fits_budget(plan):
        return f"DOES NOT FIT {format_budget(budget)}: {words}"
    narrowly = f" narrowly, predictions may miss by {MARGIN:.0%}" * leaves_no_margin(plan)
    return f"fits {format_budget(budget)}{narrowly}: {words}"


def fits_budget(plan: Plan) -> bool:
    """Each program of a plan was made to; what all keep together may be more."""
    return plan.gpu_memory is None or plan.memory.peak_bytes <= plan.gpu_memory


def leaves_no_margin(plan: Plan) -> bool:
    """Whether less of the budget is left than predictions may miss."""
    budget = plan.gpu_memory
    return budget is not None and plan.memory.peak_bytes > (1 - MARGIN) * budget


def optimizer_words(plan: Plan) -> str:
    """Whose state the peak counts."""
    if not plan.trains or not plan.optimizer:
        return ""
    if plan.optimizer in ("none", "0"):
        return ", without an optimizer's state (none was given)"
    named = plan.optimizer
    return f", with {f'{named} bytes a parameter' if named.isdecimal() else named}"


def speed_words(plan: Plan) -> str:
    """How long a step takes; empty where the profile does not know."""
    if not plan.step_ms:
        return ""
    words = f"{format_ms(plan.step_ms)} a step, {tokens_per_second(plan):,.0f} tokens a second"
    share = share_of_peak(plan)
    return words if share is None else f"{words}, {share:.0%} of the device's peak"


def tokens_per_second(plan: Plan) -> float | None:
    """Of all ranks together."""
    return plan.step.tokens / (plan.step_ms / 1e3) if plan.step and plan.step_ms else None


def share_of_peak(plan: Plan) -> float | None:
    """What the device's products reach of its peak over the whole step."""
    if plan.step is None or not plan.step_ms or not plan.step.peak_gflops:
        return None
    return plan.step.gflops / (plan.step_ms / 1e3) / plan.step.peak_gflops


def given_up_lines(plan: Plan) -> list[str]:
    """What is given up so that it fits."""
    found = []
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


def found_line(plan: Plan) -> str:
    """What was found, and what runs each of it: ``4/4 found; 3 x ulysses, 1 x simple``."""
    mix = Counter(layer.strategy for layer in plan.layers)
    words = ", ".join(f"{count} x {name}" for name, count in mix.most_common())
    return plan.found_words + (f"; {words}" if words else "")


def strategy_lines(plan: Plan) -> list[str]:
    """Why each strategy: the reason that most of its layers have."""
    reasons: dict[str, Counter[str]] = {}
    for layer in plan.layers:
        reasons.setdefault(layer.strategy, Counter())[_reason_words(layer)] += 1
    ordered = sorted(reasons.values(), key=lambda counts: -counts.total())
    return [counts.most_common(1)[0][0] for counts in ordered]


def profile_line(plan: Plan) -> str:
    """What the predictions are made of."""
    age = age_words(plan.profile_date)
    return f"predicted with profile {plan.profile}, {age}: {plan.profile_origin}"


# --- sums and their parts -------------------------------------------------------------------------


def rest_of(parts: Sequence[Part], shown: int, words: Words) -> Part | None:
    """All parts after the first ``shown`` as one, where they are at least two."""
    rest = parts[shown:]
    if len(rest) < 2:
        return None
    amount = sum(part.amount for part in rest)
    return Part(
        cause=f"{len(rest)} more",
        amount=amount,
        words=words(amount),
        share=sum(part.share for part in rest),
    )


def memory_parts(plan: Plan) -> list[Part]:
    """What the peak is made of, the most first."""
    peak = max(plan.memory.peak_bytes, 1)
    return [
        Part(
            cause=part.cause,
            amount=part.bytes,
            words=format_bytes(part.bytes),
            share=part.bytes / peak,
            detail=part.detail,
        )
        for part in sorted(plan.memory.parts, key=lambda part: -part.bytes)
    ]


def time_parts(plan: Plan) -> list[Part]:
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
        Part(cause=cause, amount=ms, words=format_ms(ms), share=ms / plan.step_ms)
        for cause, ms in sorted(parts.items(), key=lambda item: -item[1])
        if ms
    ]


# --- layers ---------------------------------------------------------------------------------------


def _attention_words(layer: LayerPlan) -> str:
    """What it computes: mask, sizes, kernel."""
    site = layer.site
    heads = f"{site.heads}" if site.heads == site.kv_heads else f"{site.heads}/{site.kv_heads}"
    same_dims = site.head_dim == site.v_head_dim
    dims = f"{site.head_dim}" if same_dims else f"{site.head_dim}/{site.v_head_dim}"
    tokens = f"{site.q_len:,}" if site.q_len == site.kv_len else f"{site.q_len:,} x {site.kv_len:,}"
    batch = f"{site.batch} x " if site.batch != 1 else ""
    return (
        f"{layer.mask}; {batch}{tokens} tokens, {heads} heads of {dims}, {site.dtype};"
        f" {_kernel_words(layer)}"
    )


def _kernel_words(layer: LayerPlan) -> str:
    """Such as ``cuda_flash kernel``."""
    is_one = layer.kernel.isidentifier()
    return f"{layer.kernel} kernel" if is_one else f"kernels: {layer.kernel}"


def _reason_words(layer: LayerPlan) -> str:
    """Why this strategy, with its gloss; a layer that is not split has a reason only."""
    return layer.reason if layer.is_replicated else f"{layer.strategy_words}: {layer.reason}"


def site_lines(layer: LayerPlan) -> Iterator[str]:
    """What it is, and where it was found."""
    yield _attention_words(layer)
    again = "; checkpointed: its inputs are recomputed" if layer.site.checkpoint else ""
    yield f"found as {layer.found_by} at {short_source(layer.source)}{again}"


def choice_lines(layer: LayerPlan, names_axis: bool) -> Iterator[str]:
    """Why it runs so; ``names_axis``: along which axis it is split, too."""
    yield _reason_words(layer)
    if layer.recomputed:
        words = _attention_again([layer])
        yield f"computed again in backward, {words}: {format_ms(layer.again_ms)}"
    if layer.offloaded:
        size = format_bytes(layer.host_bytes)
        yield f"{size} of it wait in the host's memory: {format_ms(layer.offload_ms)}"
    if names_axis and layer.axis:
        yield f"split along {layer.axis}"


def totals_line(plan: Plan) -> str:
    """The sum of all attention."""
    layers = plan.layers
    compute, exposed = sum(x.compute_ms for x in layers), sum(x.exposed_ms for x in layers)
    return (
        f"{len(layers)} attention calls: {format_ms(plan.total_ms)} a step on each rank"
        f" ({format_ms(compute)} compute, {format_ms(exposed)} exposed communication);"
        f" {format_bytes(plan.saved_bytes)} saved for backward, up to"
        f" {format_bytes(plan.workspace_bytes)} of workspace"
    )


def short_source(source: str) -> str:
    """The last two parts of a path: enough to recognise, short enough for a table.

    >>> short_source("/usr/lib/models/llama/modeling_llama.py:254")
    'llama/modeling_llama.py:254'
    """
    return "/".join(source.split("/")[-2:])


# --- what else --------------------------------------------------------------------------------


def move_line(group: FoldedMoves) -> str:
    """Such as ``186 x all_reduce in backward, 11.1 GiB in all at lm_head.weight: why``."""
    count = f"{len(group.moves)} x " if len(group.moves) > 1 else ""
    size = f", {group.size_words}" if group.bytes else ""
    where = f" at {places_words(group.places)}" if group.places else ""
    source = f" ({short_source(group.source)})" if group.source else ""
    return f"{count}{group.kind_words}{size}{where}{source}: {group.reason}"


def places_words(places: Sequence[str]) -> str:
    """The first few of them, and how many more."""
    more = len(places) - MOST_PLACES
    named = ", ".join(places[:MOST_PLACES])
    return f"{named} and {more} more" if more > 0 else named


_GRADIENTS = {
    "with it": ", its gradients computed with it",
    "again": ", computed again in backward",
    "none": "",
}


def chunk_lines(chunks: Sequence[InChunks]) -> list[str]:
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


def _chunk_line(name: str, x: InChunks) -> str:
    later = ", what the model returns of it computed when it is touched" if x.deferred else ""
    return (
        f"{name or 'top level'} ({short_source(x.source)}): {x.count} chunks of {x.tokens:,} "
        f"tokens, {format_bytes(x.bytes)} wide{_GRADIENTS[x.gradients]}{later}"
    )


def near_lines(declined: Iterable[Declined]) -> list[str]:
    """Equal regions of equal layers together."""
    alike: dict[tuple[str, str], list[str]] = {}
    for d in declined:
        alike.setdefault((d.source, d.reason), []).append(d.name)
    return [
        (f"{len(places)} x " if len(places) > 1 else "")
        + f"{name} ({short_source(source)}): {reason}"
        for (source, reason), names in alike.items()
        for name, places in fold_names(names)
    ]
