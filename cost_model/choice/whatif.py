"""The same model elsewhere: more ranks, another link, another length, another budget.

The attention sites of a plan do not depend on where it runs, and its memory is kept as a timeline
whose peak can be taken again, so a changed plan needs no model: the strategies are chosen again for
the same sites. What was derived from the split program itself (placements outside attention) is not
derived again, and the changed plan says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ringfx.cost_model.choice.choose import choose, longest_fitting
from ringfx.cost_model.choice.overrides import AUTO, StrategyChoice
from ringfx.cost_model.choice.problem import scaled_site
from ringfx.cost_model.prediction.outside_attention import outside_ms
from ringfx.cost_model.prediction.profile import Profile
from ringfx.cost_model.step_time.step import attention_gflops
from ringfx.cost_model.step_time.waits import waits
from ringfx.errors import InvalidArgument, RingfxError
from ringfx.ir.layout import Layout
from ringfx.ir.memory_plan import MemoryPlan
from ringfx.ir.memory_timeline import in_order, memory_parts, peak
from ringfx.ir.note import Note, NoteKind, noted
from ringfx.ir.plan import Plan
from ringfx.ir.step_time import WAITS, StepPart, StepTime
from ringfx.ir.values import AttentionSite, TokenAxis
from ringfx.strategies import SPLIT_KV, STRATEGIES, Strategy
from ringfx.units.argument import Argument
from ringfx.units.parse import MOST_RANKS, parse_bytes, parse_rate, parse_tokens

__all__ = ["Change", "longest_sequence", "parse_change", "parse_sweep", "replan", "sweep"]


@dataclass(frozen=True, kw_only=True)
class Change:
    """What differs; None is as it was."""

    world_size: int | None = None
    seq_len: int | None = None
    gpu_memory: int | None = None
    link_bytes_per_s: float | None = None
    """Bandwidth of every link."""
    latency_us: float | None = None
    """Latency of every link."""


def parse_change(text: str) -> Change:
    """A change from ``name=value`` pairs with commas between.

    >>> parse_change("world-size=16,link=50GB/s")
    Change(world_size=16, seq_len=None, gpu_memory=None, link_bytes_per_s=50000000000.0, \
latency_us=None)

    Raises
    ------
    InvalidArgument
        An unknown name or a value of the wrong kind; the text lists the names.
    """
    given: dict[str, int | float] = {}
    for pair in text.split(","):
        name, _, value = pair.partition("=")
        if name.strip() not in FIELDS or not value:
            raise InvalidArgument(
                f"{pair!r} is not a change. Do: give pairs such as world-size=16,link=50GB/s; "
                f"names: {', '.join(FIELDS)}."
            )
        field, parse = FIELDS[name.strip()]
        given[field] = parse(value.strip())
    return Change(**given)  # type: ignore[arg-type]


def parse_sweep(text: str) -> tuple[str, tuple[Change, ...]]:
    """The name that is swept and a change for each value; ``a..b`` doubles from a to b.

    >>> name, changes = parse_sweep("seq-len=8k..32k")
    >>> name, [change.seq_len for change in changes]
    ('seq-len', [8192, 16384, 32768])

    Raises
    ------
    InvalidArgument
        An unknown name, or values that are none.
    """
    name, _, values = text.partition("=")
    first, dots, last = values.partition("..")
    if not dots:
        return name, tuple(parse_change(f"{name}={value}") for value in values.split(","))
    (field, _), start = FIELDS.get(name, ("", None)), parse_change(f"{name}={first}")
    low, high = getattr(start, field), getattr(parse_change(f"{name}={last}"), field)
    steps = []
    while low <= high:
        steps.append(replace(start, **{field: low}))
        low *= 2
    if not steps:
        raise InvalidArgument(
            f"{text!r} is an empty range: {first} is above {last}. Do: give {name}={last}..{first}."
        )
    return name, tuple(steps)


def _count(text: str) -> int:
    if not text.isdecimal() or len(text) > 12 or not 0 < int(text) <= MOST_RANKS:
        raise InvalidArgument(
            f"{text[:60]!r} is not an integer from 1 to {MOST_RANKS:,}. Do: give one, such as "
            "world-size=16."
        )
    return int(text)


FIELDS: Mapping[str, tuple[str, Callable[[str], int | float]]] = {
    "world-size": ("world_size", _count),
    "seq-len": ("seq_len", parse_tokens),
    "gpu-memory": ("gpu_memory", parse_bytes),
    "link": ("link_bytes_per_s", parse_rate),
    "latency-us": ("latency_us", lambda text: float(_count(text))),
}


def replan(
    plan: Plan,
    change: Change,
    profile: Profile,
    strategy: StrategyChoice = AUTO,
    strategies: Mapping[str, Strategy] = STRATEGIES,
    *,
    advise: bool = True,
) -> Plan:
    """The plan of the same model under a change, strategies chosen again for all layers.

    ``advise``: whether the error where nothing fits names what would.

    Raises
    ------
    OutOfMemory, StrategyRefused
        As ``choose`` does.
    """
    world_size = change.world_size or plan.world_size
    if change.seq_len is not None:
        _refuse_without_attention(plan)
    scale = 1.0 if change.seq_len is None else change.seq_len / tokens(plan)
    sites = [scaled_site(layer.site, scale) for layer in plan.layers]
    budget = change.gpu_memory or plan.gpu_memory
    profile = changed_profile(profile, change)
    axes = [layer.axis for layer in plan.layers]
    layers = choose(
        sites, world_size=world_size, profile=profile, gpu_memory=budget, strategy=strategy,
        memory=plan.memory.timeline, strategies=strategies, replicated=replicated_layers(plan),
        few_queries=few_query_layers(plan), recompute=plan.recompute, offload=plan.offload,
        advise=advise,
    )  # fmt: skip
    same_program = (world_size, scale) == (plan.world_size, 1.0)
    collectives = plan.collectives if same_program else ()
    notes = (
        *(note for note in _notes(plan, profile) if note.kind is not NoteKind.BUDGET),
        *noted(profile.budget_doubts(budget), NoteKind.BUDGET),
        *noted(_link_words(change)),
    )
    waiting = waits(layers, collectives, world_size, profile)
    changed = replace(
        plan,
        world_size=world_size,
        gpu_memory=budget,
        profile=profile.name,
        profile_origin=profile.origin,
        profile_date=profile.date,
        layers=tuple(replace(x, axis=axis) for x, axis in zip(layers, axes, strict=True)),
        axes=tuple(_changed_axis(axis, scale, world_size) for axis in plan.axes),
        collectives=collectives,
        outside_ms=outside_ms(collectives, world_size, profile),
        hidden_ms=plan.hidden_ms if same_program else 0.0,
        step=_changed_step(plan, sites, waiting, scale, world_size),
        notes=tuple(dict.fromkeys((*notes, *(() if same_program else (NOT_DERIVED,))))),
    )
    return replace(changed, memory=changed_memory(changed, same_program))


def _changed_step(
    plan: Plan,
    sites: Sequence[AttentionSite],
    waiting: Sequence[StepPart],
    scale: float,
    world_size: int,
) -> StepTime | None:
    """What runs outside attention, at the changed length and over the changed ranks."""
    if plan.step is None:
        return None
    ranks = world_size / plan.world_size
    return replace(
        plan.step,
        parts=(*(x.scaled(scale, ranks) for x in plan.step.parts if x.cause != WAITS), *waiting),
        tokens=round(plan.step.tokens * scale),
        attention_gflops=attention_gflops(sites, replicated_layers(plan), world_size),
        by_block=plan.step.by_block if (scale, ranks) == (1.0, 1.0) else (),
    )


def replicated_layers(plan: Plan) -> Mapping[int, str]:
    """The numbers of layers that no rank has a part of, and why."""
    whole = {i: layer.reason for i, layer in enumerate(plan.layers) if layer.is_replicated}
    return {i: why.removeprefix("not split: ") for i, why in whole.items()}


def few_query_layers(plan: Plan) -> frozenset[int]:
    """The numbers of layers of which every rank has all queries."""
    return frozenset(i for i, x in enumerate(plan.layers) if x.strategy == SPLIT_KV.name)


NOT_DERIVED = Note(
    text="not computed again: which values are split, and the communication outside attention "
    "(left out); memory is that of the same program at this length and over these ranks"
)


def _notes(plan: Plan, profile: Profile) -> Iterator[Note]:
    """The plan's, but of another profile those of that one."""
    if plan.profile == profile.name:
        yield from plan.notes
        return
    yield from (note for note in plan.notes if note.kind is not NoteKind.PROFILE)
    yield from noted(profile.notes, NoteKind.PROFILE)


def _link_words(change: Change) -> Iterator[str]:
    if change.link_bytes_per_s is not None:
        yield f"as if every link had {change.link_bytes_per_s / 1e9:g} GB/s"
    if change.latency_us is not None:
        yield f"as if every link's latency were {change.latency_us:g} us"


def changed_memory(changed: Plan, same_program: bool) -> MemoryPlan:
    """The peak taken again, for the changed plan's length, ranks and strategies."""
    timeline = changed.memory.timeline
    if timeline is None:
        return MemoryPlan(unknown=changed.memory.unknown)
    sites = [layer.site for layer in changed.layers]
    found = peak(
        timeline, in_order(timeline, sites, changed.layers), world_size=changed.world_size,
        seq_len=tokens(changed),
    )  # fmt: skip
    parts = memory_parts(found)
    is_same = same_program and parts == changed.memory.parts
    return (
        changed.memory
        if is_same
        else replace(changed.memory, parts=parts, by_block=(), over_program=())
    )


def changed_profile(profile: Profile, change: Change) -> Profile:
    """The profile with the links that the change names."""
    gbytes = None if change.link_bytes_per_s is None else change.link_bytes_per_s / 1e9
    links = tuple(
        replace(
            row,
            gbytes_per_s=row.gbytes_per_s if gbytes is None else gbytes,
            latency_us=row.latency_us if change.latency_us is None else change.latency_us,
        )
        for row in profile.links
    )
    return replace(profile, links=links)


def _refuse_without_attention(plan: Plan) -> None:
    if not plan.layers:
        raise InvalidArgument(
            "this plan has no attention, by which another length could be predicted. Do: plan the "
            "model anew, with inputs of that length."
        )


def tokens(plan: Plan) -> int:
    """The length that a change of ``seq_len`` speaks of: that of the longest sequence."""
    return max((layer.site.kv_len for layer in plan.layers), default=1)


def _changed_axis(axis: TokenAxis, scale: float, world_size: int) -> TokenAxis:
    length = max(1, round(axis.length * scale))
    local = Layout(axis.layout, length, world_size).local_length
    return replace(axis, length=length, local_length=local)


# --- many at once -------------------------------------------------------------------------------


def sweep(
    plan: Plan,
    changes: Sequence[Change],
    profile: Profile,
    strategy: StrategyChoice = AUTO,
    strategies: Mapping[str, Strategy] = STRATEGIES,
) -> tuple[Plan | RingfxError, ...]:
    """The plan under each change, or why there is none: what is needed, and not what would fit."""
    found: list[Plan | RingfxError] = []
    for change in changes:
        try:
            found.append(replan(plan, change, profile, strategy, strategies, advise=False))
        except RingfxError as error:
            found.append(error)
    return tuple(found)


def longest_sequence(
    plan: Plan,
    profile: Profile,
    strategy: StrategyChoice = AUTO,
    limit: int = 2**40,
    strategies: Mapping[str, Strategy] = STRATEGIES,
) -> int:
    """The longest sequence for which a choice of strategies fits the plan's budget; 0: none.

    Raises
    ------
    InvalidArgument
        The plan has no budget, so every length fits.
    """
    _refuse_without_attention(plan)
    if plan.gpu_memory is None:
        raise InvalidArgument(
            "the longest sequence needs a budget. Do: plan with one, such as "
            f"{Argument('gpu_memory', '80GiB')}."
        )
    return longest_fitting(
        [layer.site for layer in plan.layers], world_size=plan.world_size, profile=profile,
        gpu_memory=plan.gpu_memory, limit=limit, strategy=strategy, memory=plan.memory.timeline,
        strategies=strategies, replicated=replicated_layers(plan),
        few_queries=few_query_layers(plan), recompute=plan.recompute,
        offload=plan.offload,
    )  # fmt: skip
