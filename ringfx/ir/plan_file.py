"""A saved plan, read back: its fields by themselves, and beside those that they must agree with."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from ringfx.errors import InvalidArgument
from ringfx.ir.attention_spec import AttentionSpec
from ringfx.ir.layout import Layout
from ringfx.ir.memory_plan import MemoryPlan, MemoryTimeline
from ringfx.ir.memory_timeline import CAUSES
from ringfx.ir.plan import SCHEMA_VERSION, LayerPlan, Plan
from ringfx.ir.tiles.checked import undefined
from ringfx.ir.values import AttentionSite, TokenAxis
from ringfx.validation.json_reader import Source, parse_json, shown, validated

__all__ = ["read_plan"]

WRITER = "pass what Plan.to_json() or `ringfx plan --json` wrote"
ROUNDING = 1e-6
"""By how much times that are sums may differ, as a share."""


def read_plan(text: str, name: str) -> Plan:
    """The plan that ``Plan.to_json`` wrote as ``text``."""
    source = Source(
        where=_named("this is not a plan", name),
        damaged=_named("this plan is damaged", name),
        error=InvalidArgument,
        remedy=WRITER,
    )
    if not isinstance(text, str):
        source.refuse(f"it is a {type(text).__name__}, not a string", damaged=False)
    fields = parse_json(text, source)
    if not isinstance(fields, dict) or "schema" not in fields:
        source.refuse('the text has no "schema" field', damaged=False)
    schema = fields["schema"]
    if isinstance(schema, bool) or schema != SCHEMA_VERSION:
        raise InvalidArgument(
            f"{_named('this plan', name)} has schema version {shown(schema)}; this ringfx reads"
            f" version {SCHEMA_VERSION}. Do: make the plan again with this version of ringfx."
        )
    found = {**fields, "schema": SCHEMA_VERSION}
    if isinstance(fields.get("notes"), list):
        found["notes"] = [{"text": x} if isinstance(x, str) else x for x in fields["notes"]]
    return validated(Plan, found, source, _problems)


def _named(words: str, name: str) -> str:
    return words if name == "plan" else f"{name}: {words}"


# --- what does not go together --------------------------------------------------------------------


def _problems(plan: Plan) -> Iterator[str]:
    if plan.gpu_memory == 0:
        yield "gpu_memory must be 1 or more; got 0"
    if plan.attentions is not None and plan.attentions < len(plan.layers) + len(plan.missed):
        yield (
            f"attentions is {plan.attentions}, and {len(plan.layers)} are planned and"
            f" {len(plan.missed)} missed"
        )
    for i, axis in enumerate(plan.axes):
        yield from (f"axes[{i}]: {problem}" for problem in _of_axis(axis, plan.world_size))
    for i, layer in enumerate(plan.layers):
        yield from (f"layers[{i}]: {problem}" for problem in _of_layer(layer))
    for spec in dict.fromkeys(layer.site.spec for layer in plan.layers):
        yield from _of_spec(spec)
    yield from _of_memory(plan.memory)
    if plan.memory.timeline is not None:
        yield from _of_timeline(plan.memory.timeline, {layer.site.node for layer in plan.layers})


def _of_axis(axis: TokenAxis, world_size: int) -> Iterator[str]:
    local = Layout(axis.layout, axis.length, world_size).local_length
    if axis.local_length != local:
        yield (
            f"{axis.length} tokens, {axis.layout} over {world_size} ranks, are {local} on each;"
            f" local_length is {axis.local_length}"
        )


def _of_layer(layer: LayerPlan) -> Iterator[str]:
    yield from _of_times(layer)
    yield from _of_site(layer.site)
    if layer.result_bytes > layer.saved_bytes:
        yield f"result_bytes {layer.result_bytes} is above saved_bytes {layer.saved_bytes}"


def _of_times(layer: LayerPlan) -> Iterator[str]:
    """``forward + backward == compute + exposed``, and hidden communication is not exposed."""
    total, parts = layer.total_ms, layer.compute_ms + layer.exposed_ms
    if abs(total - parts) > ROUNDING * max(total, parts):
        yield (
            f"forward_ms + backward_ms is {total:g} and compute_ms + exposed_ms {parts:g}: they"
            " must be equal"
        )
    if layer.exposed_ms > layer.communication_ms * (1 + ROUNDING):
        yield (
            f"exposed_ms {layer.exposed_ms:g} is above communication_ms {layer.communication_ms:g}"
        )
    if layer.backward_ms and not layer.site.trains:
        yield f"backward_ms is {layer.backward_ms:g} in a plan without training"


def _of_site(site: AttentionSite) -> Iterator[str]:
    if site.heads % site.kv_heads:
        yield f"site.heads {site.heads} is not a multiple of site.kv_heads {site.kv_heads}"
    if site.taken_bytes > site.matrix_bytes:
        yield f"site.taken_bytes {site.taken_bytes} is above site.matrix_bytes {site.matrix_bytes}"


def _of_spec(spec: AttentionSpec) -> Iterator[str]:
    for name in ("keep", "bias", "slope"):
        if (why := undefined(getattr(spec, name), spec.q_len, spec.kv_len)) is not None:
            yield f"site.spec.{name}: {why}"


def _of_memory(memory: MemoryPlan) -> Iterator[str]:
    """A block holds no more than the peak that it is a part of."""
    for name, size in memory.by_block:
        if memory.parts and size > memory.peak_bytes:
            yield f"memory.by_block: {size} bytes of {shown(name)} are above the peak"


def _of_timeline(timeline: MemoryTimeline, nodes: Collection[str]) -> Iterator[str]:
    """Numbers of layers, terms and masks name some that exist."""
    for i, term in enumerate(timeline.terms):
        if term.cause not in CAUSES:
            yield f"memory.timeline.terms[{i}].cause {shown(term.cause)} is not known"
    for i, layer in enumerate(timeline.layers):
        if layer.node not in nodes:
            yield (
                f"memory.timeline.layers[{i}].node {shown(layer.node)} is not the node of an "
                "attention"
            )
    num_layers, num_masks = len(timeline.layers), len(timeline.masks)
    for i, moment in enumerate(timeline.moments):
        numbers = (*moment.working, *moment.again)
        if len(moment.bytes) != len(timeline.terms):
            yield (
                f"memory.timeline.moments[{i}] has {len(moment.bytes)} bytes for"
                f" {len(timeline.terms)} terms"
            )
        if max(moment.layers, *(n + 1 for n in numbers), 0) > num_layers:
            yield f"memory.timeline.moments[{i}] names a layer beyond the {num_layers} there are"
        if moment.masks > num_masks:
            yield f"memory.timeline.moments[{i}] names a mask beyond the {num_masks} there are"
    for i, mask in enumerate(timeline.masks):
        if any(n >= num_layers for n in mask.readers):
            yield f"memory.timeline.masks[{i}] names a layer beyond the {num_layers} there are"
