"""The whole journey of a model, in order, on one screen."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Graph, GraphModule

from ringfx.comm.world import World
from ringfx.compile.gc_freeze import left_alone
from ringfx.compile.settings import Settings
from ringfx.cost_model import alive_in, choose, load_profile, outside_ms, unpriced
from ringfx.errors import AttentionReplicated, NoAxisRule, VerificationError
from ringfx.ir.plan import LayerPlan, Plan
from ringfx.ir.tiles.words import whole_text
from ringfx.ir.values import Arrival, AttentionSite, Captured, Sites, TokenAxis
from ringfx.passes.axes import AxisMap, name_axes
from ringfx.passes.axes.rules import find_rule
from ringfx.passes.capture import capture
from ringfx.passes.capture.origin import describe_node
from ringfx.passes.capture.precision import autocast_off
from ringfx.passes.detect import detect
from ringfx.passes.detect.count_attention import missed, refuse_missed
from ringfx.passes.masks import recover
from ringfx.passes.normalize import insert_reshards, normalize, separate_columns
from ringfx.passes.place import PlacementMap, place, why_replicated
from ringfx.passes.rewrite import LocalProgram, rewrite
from ringfx.passes.token_axes import Lines, TokenDim, TokenLine, find_lines
from ringfx.passes.verify import split_along, verify

__all__ = ["NO_VALUES", "Lowered", "lower"]

NO_VALUES = "masks read buffers that have no values here"


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


LONGEST_CHAIN = 16
"""Times that the program is normalized at most; twice is common, a stack of convolutions needs one
time for each."""


@left_alone()
def lower(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    settings: Settings,
    world: World,
    arrivals: Mapping[int, Arrival] | None = None,
) -> Lowered:
    """Capture, detect, recover masks, name axes, place, choose, rewrite and verify.

    ``arrivals`` says which inputs are split already, by their number; the local program takes the
    parts of those that it can use so (``Lowered.arrived``), and all others whole.
    """
    captured = capture(gm, example_inputs, known=find_rule)
    with autocast_off():  # the captured program says every cast
        return _lowered(captured, settings, world, arrivals or {})


def _lowered(
    captured: Captured, settings: Settings, world: World, arrivals: Mapping[int, Arrival]
) -> Lowered:
    sites = recover(captured, detect(captured))
    overlooked, attentions = missed(captured, sites)
    if settings.strict:
        refuse_missed(overlooked)
    graph = captured.graph_module.graph

    axes = name_axes(graph)
    given = [n for n in graph.nodes if n.op == "placeholder"]
    split = {given[i]: arrival for i, arrival in arrivals.items()}
    lines = find_lines(graph, axes, sites.found, world.size, split)
    for _ in range(LONGEST_CHAIN):  # a normalized call may show the next where tokens are
        changed = world.size > 1 and (
            normalize(graph, axes, lines)
            or separate_columns(graph, lines)
            or insert_reshards(graph, axes, lines)
        )
        if not changed:
            break
        axes = name_axes(graph)
        lines = find_lines(graph, axes, sites.found, world.size, split)
    unknown = _refuse_unknown(axes, lines, settings, world)

    placement = place(graph, lines)
    whole = _replicated(graph, placement, sites, settings, world)

    device = sites.found[0].device if sites.found else "cpu"
    profile = load_profile(settings.profile, device=device)
    alive = alive_in(
        captured, carries_tokens=placement.is_sharded if world.size > 1 else lines.carries_one,
        power=lines.power, world_size=world.size, optimizer=settings.optimizer,
        compiler=settings.compiler,
    )  # fmt: skip
    layers = choose(
        sites.found, world_size=world.size, profile=profile, gpu_memory=settings.gpu_memory,
        strategy=settings.strategy, memory=alive.timeline, replicated=whole,
    )  # fmt: skip

    dtypes = {site.dtype for site in sites.found}
    strategies = {x.site.node: x.strategy for x in layers if not x.is_replicated}
    kernels = {x.site.node: x.kernel for x in layers}
    local = rewrite(captured, placement, strategies, group=world.group, kernels=kernels)
    verify(captured, sites, local)
    layers = _along(layers, split_along(captured, sites, local), lines, world)

    plan = Plan(
        world_size=world.size, gpu_memory=settings.gpu_memory, device=profile.device,
        profile=profile.name, profile_origin=profile.origin, profile_date=profile.date,
        layers=layers, declined=sites.declined, missed=overlooked, attentions=attentions,
        axes=_token_axes(local), reshardings=local.reshardings,
        outside_ms=outside_ms(local.reshardings, world.size, profile),
        memory=alive.plan({layer.site.node: layer for layer in layers}),
        notes=(*profile.notes, *profile.missing_rows(dtypes), *unpriced(layers, profile), *unknown,
               *_whole_masks(sites, local, world), *_unvalued(captured, sites),
               *_graph_break(captured)),
    )  # fmt: skip
    return Lowered(
        captured=captured,
        plan=plan,
        local=local,
        held=sites.buffers,
        arrived=frozenset(i for i, n in enumerate(given) if n in lines.arrived),
        digest=_digest(captured, plan, arrivals),
    )


def _refuse_unknown(
    axes: AxisMap, lines: Lines, settings: Settings, world: World
) -> tuple[str, ...]:
    """Operators that touch tokens without a row: an error, or a note that they are gathered for."""
    if world.size == 1:
        return ()
    touching = [n for n in axes.missing if any(lines.token_dim(i) for i in n.all_input_nodes)]
    if touching and settings.on_unsupported == "error":
        raise NoAxisRule(
            f"{describe_node(touching[0])}: this operator touches split tokens, and the axis table "
            "has no row that says how to split it. Do: pass on_unsupported='gather' to run it "
            "whole on every rank (right, and as large as the unsplit model), or add a row to "
            "passes/axes/rules."
        )
    return tuple(
        f"{describe_node(n)}: no axis rule; its inputs are gathered and it runs whole on every rank"
        for n in touching
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
    """What a run would look at, and a plan of a model without values cannot."""
    if not sites.unvalued:
        return ()
    first, more = captured.input_names[sites.unvalued[0]], len(sites.unvalued) - 1
    return (
        f"{NO_VALUES}: {first}{f' and {more} more' if more else ''} (the model is on meta, or "
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
            f"graph break at {captured.graph_break}; what is split stays so where the next program "
            "takes it split"
        )
    if captured.uncompiled_caller is not None:
        notes.append(
            f"graph break in {captured.uncompiled_caller}, which runs uncompiled and calls "
            "compiled parts; what is split stays so where the next one takes it split"
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
            f"{len(whole)} of {len(sites.found)} attentions cannot be split and would run whole on "
            f"each of the {world.size} ranks:\n{places}\n"
            "Do: drop strict to run them so, in the time and memory that one rank needs."
        )
    return whole


def _along(
    layers: Sequence[LayerPlan], token_dims: Mapping[str, TokenDim], lines: Lines, world: World
) -> tuple[LayerPlan, ...]:
    """Each layer with the axis along which the rewritten program splits it."""
    told = []
    for layer in layers:
        found = token_dims.get(layer.site.node)
        if world.size > 1 and (found is None) != layer.is_replicated:
            raise VerificationError(
                f"{layer.name} ({layer.source}): planned as {layer.strategy}, and in the rewritten "
                f"program it is {'whole' if found is None else 'split'}. This is a defect of "
                "ringfx; please report it with the model."
            )
        axis = "" if found is None else _axis_name(lines, found)
        told.append(replace(layer, axis=axis))
    return tuple(told)


def _axis_name(lines: Lines, tokens: TokenDim) -> str:
    name = _line_name(lines, lines.lines[tokens.line])
    return name if tokens.inner == 1 else f"{name}, each of {tokens.inner} of its queries"


def _line_name(lines: Lines, line: TokenLine) -> str:
    return f"tokens {line.index}" if len(lines.lines) > 1 else "tokens"


def _token_axes(local: LocalProgram) -> tuple[TokenAxis, ...]:
    """The axes along which some value of the rewritten program is split; with one rank, all."""
    placement = local.placement
    lines = placement.lines
    values = {v for value in local.values for v in (value, *value.users) if placement.is_sharded(v)}
    used = {c.line for v in values if isinstance(c := lines.token_dim(v), TokenDim)}
    return tuple(
        TokenAxis(
            axis=_line_name(lines, line),
            length=line.length,
            layout=line.layout.kind,
            local_length=line.layout.local_length,
        )
        for line in lines.lines
        if line.index in used or line.layout.world_size == 1
    )


def _digest(captured: Captured, plan: Plan, arrivals: Mapping[int, Arrival]) -> str:
    graph = captured.graph_module.graph
    text = "\n".join(f"{n.format_node()} {_shape(n.meta.get('val'))}" for n in graph.nodes)
    return hashlib.sha256(f"{text}\n{arrivals}\n{plan.digest()}".encode()).hexdigest()


def _shape(value: Any) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if hasattr(value, "shape") else ""
