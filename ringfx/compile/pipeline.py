"""The whole journey of a model, in order, on one screen."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

from torch.fx import Graph, GraphModule, Node

from ringfx.comm.state_ranks import ONE_RANK, StateRanks
from ringfx.comm.world import World
from ringfx.compile.after_pass import AfterPass
from ringfx.compile.axis_names import axis_name, token_axes
from ringfx.compile.computed_whole import notes_of_whole
from ringfx.compile.offload import mark_offloaded
from ringfx.compile.program_memory import (
    StepInChunks,
    alive_over,
    sharded_states,
    step_in_chunks,
)
from ringfx.compile.program_time import run_again, step_time, time_of_program
from ringfx.compile.settings import Settings
from ringfx.compile.without_attention import given_dims, notes_without_attention
from ringfx.cost_model import (
    Profile,
    choose,
    hidden_ms,
    load_profile,
    outside_ms,
    unmeasured,
    unpriced,
)
from ringfx.cost_model.peak_memory.alive import Alive
from ringfx.errors import DEFECT, AttentionReplicated, NoAxisRule, OutOfMemory, VerificationError
from ringfx.ir.memory_plan import MemoryPlan, MemoryTimeline
from ringfx.ir.note import NoteKind, noted
from ringfx.ir.plan import LayerPlan, Plan
from ringfx.ir.tiles.words import whole_text
from ringfx.ir.values import Arrival, AttentionSite, Captured, InChunks, Sites
from ringfx.passes.axes import AxisMap
from ringfx.passes.axes.call import AxisRules
from ringfx.passes.axes.rules import RULES
from ringfx.passes.capture.origin import describe_node
from ringfx.passes.capture.precision import autocast_off
from ringfx.passes.chunks import find_regions, run_in_chunks
from ringfx.passes.chunks.outline import Outlined
from ringfx.passes.chunks.sizes import Chunks, Sized, all_sized
from ringfx.passes.detect.count_attention import refuse_missed
from ringfx.passes.place import PlacementMap, local_sites, place, why_replicated
from ringfx.passes.rewrite import LocalProgram, rewrite
from ringfx.passes.steps import Attentions, find_attention, find_tokens, told_as_written
from ringfx.passes.tensor_parallel import capture_parts
from ringfx.passes.token_axes import Lines, TokenDim
from ringfx.passes.verify import few_queries, split_along, verify
from ringfx.units.argument import Argument, Code
from ringfx.watch.stages import stage_done

__all__ = ["Lowered", "lower"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Lowered:
    """One program of the model, planned and rewritten for one rank."""

    captured: Captured
    plan: Plan
    local: LocalProgram
    held: tuple[int, ...]
    """Inputs whose values the program was made for: masks that modules keep."""
    arrived: frozenset[int]
    """Inputs of which the program takes this rank's part."""
    digest: str
    """Equal on all ranks that run the same program under the same plan."""


def lower(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    settings: Settings,
    world: World,
    arrivals: Mapping[int, Arrival] | None = None,
    states: StateRanks = ONE_RANK,
) -> Lowered:
    """Capture, detect, recover masks, name axes, place, choose, rewrite and verify.

    ``arrivals`` says which inputs are split already, by their number; the local program takes the
    parts of those that it can use so (``Lowered.arrived``), and all others whole.
    ``states``: the ranks that parameters are sharded over.
    """
    after = AfterPass(world)
    captured = capture_parts(gm, example_inputs, settings.rules)
    after.input_names = captured.input_names
    after("capture", captured.graph_module.graph, stage="captured")
    with autocast_off():  # the captured program says every cast
        return _lowered(captured, settings, world, arrivals or {}, states, after)


def _lowered(
    captured: Captured,
    settings: Settings,
    world: World,
    arrivals: Mapping[int, Arrival],
    state_ranks: StateRanks,
    after: AfterPass,
) -> Lowered:
    attentions = find_attention(captured, rules=settings.rules)
    sites, graph = attentions.sites, captured.graph_module.graph
    after("detect-and-masks", graph, stage="detected")

    given = [n for n in graph.nodes if n.op == "placeholder"]
    split = {given[i]: arrival for i, arrival in arrivals.items()}
    is_whole = not (captured.graph_break or captured.uncompiled_caller)
    axes, lines = find_tokens(
        graph, sites.found, world.size, split, rules=settings.rules,
        held=[given[i] for i in captured.held], is_whole=is_whole,
        token_dims={} if split else given_dims(
            captured, settings.token_dims, sites, world.size, is_whole=is_whole
        ),
    )  # fmt: skip
    after("axes-and-normalize", graph, lambda n: _tokens_note(lines, n))
    unknown = _refuse_unknown(axes, lines, settings, world)

    placement = place(graph, lines)
    after("place", graph, lambda n: _placement_note(placement, n), stage="placed")
    sites = local_sites(sites, placement)
    attentions = told_as_written(attentions, graph, placement)
    if settings.strict:
        refuse_missed(attentions.missed)
    whole = _replicated(graph, placement, sites, settings, world)

    device = sites.found[0].device if sites.found else placement.device.type
    profile = load_profile(settings.profile, device=device)
    regions = find_regions(graph, placement, deferrable=_may_defer(captured, settings, world))

    time = time_of_program(captured, placement, profile, settings)

    states = sharded_states(captured, state_ranks)
    may_shard = state_ranks.ranks == 1 and world.size > 1

    def step_in(in_chunks: Sequence[Sized]) -> StepInChunks:
        return step_in_chunks(captured, in_chunks, placement, time, settings, world)

    def planned(in_chunks: tuple[Sized, ...], advise: bool) -> Planned:
        step = step_in(in_chunks)
        alive = alive_over(step, state_ranks, settings)

        @cache
        def sharded() -> MemoryTimeline:
            return alive_over(step, StateRanks(ranks=world.size), settings).timeline

        layers = choose(
            sites.found, world_size=world.size, profile=profile, gpu_memory=settings.gpu_memory,
            strategy=settings.strategy, memory=alive.timeline, strategies=settings.strategies,
            replicated=whole, sharded=sharded if may_shard else None, offload=settings.offload,
            few_queries=few_queries(graph, placement, sites), recompute=settings.recompute,
            advise=advise,
        )  # fmt: skip
        again_ms = (
            sum(time.again(x.region.nodes).total_ms for x in run_again(in_chunks)) if time else 0.0
        )
        return Planned(
            in_chunks=in_chunks, alive=alive, outline=step.outline, layers=layers,
            cost_ms=again_ms + sum(x.total_ms + x.again_ms + x.offload_ms for x in layers),
        )  # fmt: skip

    sizes = partial(all_sized, regions, lines, profile.device)
    made = _with_more_chunks(planned, sizes, settings.chunks)
    stage_done("chosen")
    alive, layers = made.alive, made.layers
    alive.tag(layers, made.outline.originals)

    chosen = {
        x.site.node: settings.nameable[x.strategy].in_groups(x.head_groups)
        for x in layers
        if not (x.is_replicated or x.is_local)
    }
    kernels = {x.site.node: x.kernel for x in layers}
    local = rewrite(
        captured, placement, chosen, group=world.group, kernels=kernels, states=states,
        state_ranks=state_ranks,
    )  # fmt: skip
    after("rewrite", local.graph_module.graph)
    verify(captured, sites, local)
    layers = _along(layers, split_along(captured, sites, local), lines, world)
    local, done = run_in_chunks(local, made.in_chunks, captured.needs_grad)
    mark_offloaded(local.graph_module.graph)
    after("chunks", local.graph_module.graph, stage="rewritten")
    if len(done) < len(made.in_chunks):
        alive = alive_over(step_in(done), state_ranks, settings)

    memory = alive.plan({layer.site.node: layer for layer in layers})
    plan = _plan_of(captured, attentions, layers, local, memory, profile, unknown, settings, world)
    told = (
        *notes_without_attention(
            captured, placement, sites.declined, world.size, is_given=bool(settings.token_dims)
        ),
        *notes_of_whole(captured, placement, world.size),
    )
    step = step_time(time, captured, done, layers, local.collectives, states, state_ranks, settings)
    if step is not None and lines.inputs:
        step = replace(step, tokens=lines.inputs[0].tokens)
    plan = replace(plan, chunks=tuple(map(_in_chunks, done)), step=step, notes=(*plan.notes, *told))
    return Lowered(
        captured=captured,
        plan=plan,
        local=local,
        held=sites.buffers,
        arrived=frozenset(i for i, n in enumerate(given) if n in lines.arrived),
        digest=_digest(captured, plan, arrivals),
    )


def _tokens_note(lines: Lines, node: Node) -> str:
    """``tokens in dim 1``."""
    tokens = lines.token_dim(node)
    if not isinstance(tokens, TokenDim):
        return ""
    return f"{axis_name(lines, tokens, is_local=False)} in dim {tokens.dim}"


def _placement_note(placement: PlacementMap, node: Node) -> str:
    if placement.is_sharded(node):
        return "sharded"
    why = placement.reasons.get(node)
    return "" if why is None else f"replicated: {why}"


@dataclass(frozen=True, eq=False, kw_only=True)
class Planned:
    """A choice for all layers, with some regions in chunks."""

    in_chunks: tuple[Sized, ...]
    alive: Alive
    outline: Outlined
    layers: tuple[LayerPlan, ...]
    cost_ms: float
    """Of attention and of what is computed again or offloaded."""

    @property
    def computes_again(self) -> bool:
        return any(x.recomputed for x in self.layers)


def _may_defer(captured: Captured, settings: Settings, world: World) -> bool:
    """Whether outputs may be computed when they are touched: not between programs of one call."""
    broken = captured.graph_break or captured.uncompiled_caller
    return world.size > 1 and settings.outputs == "global" and not broken


def _with_more_chunks(
    planned: Callable[[tuple[Sized, ...], bool], Planned],
    sizes: Callable[[Chunks], tuple[Sized, ...]],
    chunks: Chunks,
) -> Planned:
    """The plan with as few regions in chunks as fit the memory; where layers would be computed
    again for it, the cheaper of both.

    ``planned``: with these chunks; and whether to look for what would fit where nothing does.
    """
    few, most = sizes(chunks), sizes("all")
    if chunks != "auto" or few == most:
        return planned(few, True)
    try:
        made = planned(few, False)
    except OutOfMemory:
        return planned(most, True)
    if not made.computes_again:
        return made
    return min(made, planned(most, True), key=lambda made: made.cost_ms)


def _plan_of(
    captured: Captured,
    attentions: Attentions,
    layers: tuple[LayerPlan, ...],
    local: LocalProgram,
    memory: MemoryPlan,
    profile: Profile,
    unknown: tuple[str, ...],
    settings: Settings,
    world: World,
) -> Plan:
    sites = attentions.sites
    dtypes = {site.dtype for site in sites.found}
    about_profile = (
        *profile.notes,
        *profile.missing_rows(dtypes),
        *unpriced(layers, profile),
        *(unmeasured(layers, profile) if world.size > 1 else ()),
    )
    graph = captured.graph_module.graph
    hidden = 0.0
    if settings.compiler != "eager":  # which waits for each message at once
        hidden = hidden_ms(local.collectives, layers, world.size, profile)
    return Plan(
        world_size=world.size, gpu_memory=settings.gpu_memory, device=profile.device,
        profile=profile.name, profile_origin=profile.origin, profile_date=profile.date,
        layers=layers, declined=sites.declined, missed=attentions.missed,
        by_rows=attentions.by_rows, by_columns=attentions.by_columns,
        by_channels=attentions.by_channels,
        attentions=attentions.count, axes=token_axes(local), collectives=local.collectives,
        outside_ms=outside_ms(local.collectives, world.size, profile), memory=memory,
        hidden_ms=hidden, optimizer=str(settings.optimizer), recompute=settings.recompute,
        offload=settings.offload,
        notes=(
            *noted(about_profile, NoteKind.PROFILE),
            *noted(profile.budget_doubts(settings.gpu_memory), NoteKind.BUDGET),
            *noted(unknown),
            *noted(_whole_masks(sites, local, world), NoteKind.DENSE_MASK),
            *noted(_unvalued(captured, sites), NoteKind.NO_VALUES),
            *noted(_graph_break(captured), NoteKind.GRAPH_BREAK),
            *noted(_given_rules(graph, settings.rules)),
            *noted(_not_again(layers, settings)),
        ),
    )  # fmt: skip


def _not_again(layers: Sequence[LayerPlan], settings: Settings) -> tuple[str, ...]:
    """That nothing is computed again though it was asked for."""
    asked = settings.recompute in ("layers", "attention")
    trained = [x for x in layers if x.site.trains]
    if not asked or not trained or any(x.recomputed for x in trained):
        return ()
    why = "the model checkpoints parts of itself, which stay as they are"
    if settings.compiler == "eager":
        why = f"{Argument('compiler', 'eager')} runs nothing again; inductor and aot_eager do"
    return (f"{Argument('recompute', settings.recompute)} has no effect: {why}",)


def _refuse_unknown(
    axes: AxisMap, lines: Lines, settings: Settings, world: World
) -> tuple[str, ...]:
    """Operators that touch tokens without a row: an error, or a note that they are gathered for."""
    if world.size == 1:
        return ()
    touching = [n for n in axes.missing if any(lines.token_dim(i) for i in n.all_input_nodes)]
    if touching and settings.on_unsupported == "error":
        raise NoAxisRule(
            f"{describe_node(touching[0])}: this operator reads split tokens, but the axis table "
            "has no rule that says how to split it. Do: pass "
            f"{Argument('on_unsupported', 'gather')} to replicate it on every rank (correct, but "
            "as large as in the unsplit model), or give a rule for it, "
            f"{Argument('rules', Code('ringfx.RULES | {operator: rule}'))}."
        )
    return tuple(
        f"{describe_node(n)}: no axis rule; its inputs are gathered and it is replicated on every "
        "rank"
        for n in touching
    )


def _given_rules(graph: Graph, rules: AxisRules) -> tuple[str, ...]:
    """What becomes of the user's own rules."""
    given = [target for target in rules if rules[target] is not RULES.get(target)]
    called = {n.target for n in graph.nodes if n.op == "call_function"}
    return tuple(
        f"{target}: split by a rule that was given"
        if target in called
        else f"{target}: a rule was given, but the captured program has no call of it"
        for target in given
    )


def _whole_masks(sites: Sites, local: LocalProgram, world: World) -> tuple[str, ...]:
    """What is read with an entry for each query and key, and is therefore as long as it is wide."""
    alike: dict[str, list[AttentionSite]] = {}
    for site in sites.found:
        x = local.matrices[site.node]
        if x.given + x.made:
            text = whole_text(x.given, x.made, x.taken, world.size)
            alike.setdefault(text, []).append(site)
    return tuple(f"{_listed(found)}: {text}" for text, found in alike.items())


def _unvalued(captured: Captured, sites: Sites) -> tuple[str, ...]:
    """Mask buffers without values: a run reads them, a plan of a model on meta cannot."""
    if not sites.unvalued:
        return ()
    first, more = captured.input_names[sites.unvalued[0]], len(sites.unvalued) - 1
    return (
        f"masks read buffers that have no values here: {first}"
        f"{f' and {more} more' if more else ''} (the model is on meta, or "
        "fake); planned as given with each call, where a run looks and may find a rule in it, such "
        "as causal. Do: build the model on cpu, or give these buffers values, and plan again.",
    )


def _listed(sites: Sequence[AttentionSite]) -> str:
    first, more = sites[0], len(sites) - 1
    return f"{first.name or first.node} ({first.source})" + (f" and {more} more" if more else "")


def _graph_break(captured: Captured) -> tuple[str, ...]:
    notes = []
    if captured.graph_break is not None:
        notes.append(
            f"graph break at {captured.graph_break}; a split value stays split if the next "
            "program can take it split"
        )
    if captured.uncompiled_caller is not None:
        notes.append(
            f"graph break in {captured.uncompiled_caller}, which runs uncompiled and calls "
            "compiled parts; a split value stays split if the next part can take it split"
        )
    return tuple(notes)


def _replicated(
    graph: Graph, placement: PlacementMap, sites: Sites, settings: Settings, world: World
) -> dict[int, str]:
    """The attentions (by their number) that cannot be split, and why; strict mode refuses them."""
    if world.size == 1:
        return {}
    nodes = {n.name: n for n in graph.nodes}
    why = {i: why_replicated(placement, nodes[site.node]) for i, site in enumerate(sites.found)}
    whole = {i: reason for i, reason in why.items() if reason is not None}
    if whole and settings.strict:
        places = "\n".join(
            f"  {sites.found[i].name or 'top level'} ({sites.found[i].source}): {reason}"
            for i, reason in whole.items()
        )
        raise AttentionReplicated(
            f"{len(whole)} of {len(sites.found)} attentions cannot be split and would be "
            f"replicated on each of the {world.size} ranks:\n"
            f"{places}\n"
            f"Do: leave {Argument('strict')} out to run them replicated, in the time and memory of "
            "one rank."
        )
    return whole


def _in_chunks(found: Sized) -> InChunks:
    region = found.region
    gradients = ("with it" if region.is_loss else "again") if region.trains else "none"
    return InChunks(
        name=region.name, source=region.source, tokens=found.chunk, count=found.count,
        bytes=found.wide_bytes, gradients=gradients, deferred=len(region.returned),  # type: ignore[arg-type]
    )  # fmt: skip


def _along(
    layers: Sequence[LayerPlan], token_dims: Mapping[str, TokenDim], lines: Lines, world: World
) -> tuple[LayerPlan, ...]:
    """Each layer with the axis along which the rewritten program splits it."""
    told = []
    for layer in layers:
        found = token_dims.get(layer.site.node)
        if world.size > 1 and (found is None) != layer.is_replicated:
            raise VerificationError(
                f"{layer.name} ({layer.source}): the plan says {layer.strategy}, but in the "
                f"rewritten program it is {'replicated' if found is None else 'sharded'}. {DEFECT}"
            )
        axis = "" if found is None else axis_name(lines, found, is_local=layer.is_local)
        told.append(replace(layer, axis=axis))
    return tuple(told)


def _digest(captured: Captured, plan: Plan, arrivals: Mapping[int, Arrival]) -> str:
    graph = captured.graph_module.graph
    text = "\n".join(f"{n.format_node()} {_shape(n.meta.get('val'))}" for n in graph.nodes)
    return hashlib.sha256(f"{text}\n{arrivals}\n{plan.digest()}".encode()).hexdigest()


def _shape(value: Any) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if hasattr(value, "shape") else ""
