"""The peak of one rank's memory over a forward and a backward, and what it is made of.

The peak is the largest sum of what is alive (``held.py``) over the positions of the program. What
is there outside attention is summed once, and a choice of strategies, a length and a number of
ranks are put in afterwards (``timeline.py``). Splitting divides what carries tokens by the ranks.
Inductor gives a buffer that is free to the next value of its size and never returns one that it
will give away again, so for each size it holds the larger of what it needs now and the smaller of
the most it needed and the most it will.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.fx import Graph, Node

from ringfx.comm.state_ranks import ONE_RANK, StateRanks
from ringfx.cost_model.peak_memory.liveness import Values, kept_values, op_name, values_of
from ringfx.cost_model.peak_memory.optimizers import state_bytes
from ringfx.cost_model.peak_memory.timeline_of import (
    AGAIN,
    Held,
    Sharded,
    again_ranges,
    keeps_result,
    num_bytes,
    of_attention,
    outside_attention,
)
from ringfx.ir import tiles
from ringfx.ir.attention_spec import AttentionSpec
from ringfx.ir.memory_timeline import (
    CAUSES,
    GIVEN,
    KEPT,
    ONLY_OF_SEVERAL,
    REUSE,
    ROWS,
    memory_parts,
    peak,
    pruned,
)
from ringfx.ir.plan import (
    LayerPlan,
    MemoryLayer,
    MemoryMask,
    MemoryMoment,
    MemoryPlan,
    MemoryTerm,
    MemoryTimeline,
)
from ringfx.ir.values import Captured
from ringfx.ops import attention
from ringfx.passes.axes.call import given_input

__all__ = ["Alive", "alive_in", "predict_memory"]


def predict_memory(
    captured: Captured,
    *,
    carries_tokens: Callable[[Node], bool],
    layers: Mapping[str, LayerPlan],
    world_size: int,
    optimizer: str | int = "none",
    compiler: str = "aot_eager",
) -> MemoryPlan:
    """The peak of a step under a choice of strategies: ``alive_in(...).plan(layers)``."""
    alive = alive_in(
        captured, carries_tokens=carries_tokens, power=lambda node: int(carries_tokens(node)),
        world_size=world_size, optimizer=optimizer, compiler=compiler,
    )  # fmt: skip
    return alive.plan(layers)


def alive_in(
    captured: Captured,
    *,
    carries_tokens: Callable[[Node], bool],
    power: Callable[[Node], int],
    world_size: int,
    optimizer: str | int = "none",
    compiler: str = "aot_eager",
    states: Collection[int] = (),
    state_ranks: StateRanks = ONE_RANK,
) -> Alive:
    """What is alive when in a step, whatever the strategies.

    Parameters
    ----------
    captured
        The program with global shapes.
    carries_tokens
        Whether a value is split over the ranks; of one rank: whether it would be.
    power
        The power of the sequence's length that a value grows with.
    optimizer
        A name of ``optimizers.OPTIMIZERS``, or bytes of state for each parameter.
    compiler
        ``inductor`` holds buffers for reuse; ``eager`` keeps all that backwards need, and runs
        nothing again.
    states
        Inputs (parameters) of which each rank holds its rows.
    state_ranks
        The ranks that hold them.
    """
    graph = captured.graph_module.graph
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    has_grad = dict(zip(inputs, captured.needs_grad, strict=True))
    parameters = [n for n, is_one in zip(inputs, captured.is_parameter, strict=True) if is_one]

    def size(node: Node) -> int:
        return math.ceil(num_bytes(node) / (world_size if carries_tokens(node) else 1))

    readers = _readers(graph, carries_tokens)
    values = replace(values_of(graph, size, has_grad), taken=frozenset(readers))
    if compiler == "eager":
        values = replace(values, region={})
    trained = [n for n in parameters if has_grad[n]]
    everything, in_place = compiler == "eager", compiler == "inductor"
    sharded = Sharded(nodes=frozenset(inputs[i] for i in states), ranks=state_ranks)

    def parameter(n: Node) -> Held:
        if n in sharded.nodes:
            return sharded.held("parameters", n, 0)
        return Held(cause="parameters", node=n, bytes=num_bytes(n))

    def optimizer_state(n: Node) -> Held:
        value: torch.Tensor = n.meta["val"]
        if n not in sharded.nodes:
            size = state_bytes(optimizer, value.numel(), value.element_size())
            return Held(cause="optimiser state", node=n, bytes=size)
        each = state_ranks.bytes_kept(value) // max(value.numel(), 1)
        size = state_bytes(optimizer, value.numel(), each)
        return sharded.held("optimiser state", n, 0, size)

    held = list(
        outside_attention(
            values, trained, everything=everything, in_place=in_place, sharded=sharded
        )
    )
    always = [
        *map(parameter, parameters),
        *(
            Held(cause=GIVEN, node=n, bytes=num_bytes(n), of=n)
            for n in _given_masks(graph, parameters)
        ),
        *map(optimizer_state, trained),
    ]
    last = len(values.nodes) - 1
    by_reads = _powers_by_reads(graph)
    return _alive_at_moments(
        values,
        [*held, *(replace(x, last=last) for x in always)],
        readers,
        Growth(power=lambda n: max(power(n), by_reads.get(n, 0)), is_split=carries_tokens),
        world_size=world_size,
        reuses=compiler == "inductor",
        unknown=("optimiser state",) if trained and optimizer == "none" else (),
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class Growth:
    """How values grow with the length and shrink with the ranks."""

    power: Callable[[Node], int]
    is_split: Callable[[Node], bool]

    def term(self, x: Held) -> MemoryTerm:
        tokens = 0 if x.of is None else self.power(x.of)
        is_split = x.of is not None and x.cause != GIVEN and self.is_split(x.of)
        is_split = is_split or bool(x.all_ranks)
        return MemoryTerm(cause=x.cause, tokens=tokens, is_split=is_split)


@dataclass(frozen=True, eq=False, kw_only=True)
class Alive:
    """What is alive when in a program: its timeline, and what the chart and blocks are made of."""

    timeline: MemoryTimeline
    positions: tuple[int, ...]
    """Of the timeline's moments."""
    values: Values
    held: tuple[Held, ...]
    world_size: int
    unknown: tuple[str, ...]

    def plan(self, layers: Mapping[str, LayerPlan]) -> MemoryPlan:
        """The peak under these layers, by the name of their nodes; those that are missing count
        nothing, which gives what there is outside attention."""
        chosen = [layers.get(layer.node) for layer in self.timeline.layers]
        found = peak(
            self.timeline, chosen, world_size=self.world_size, seq_len=self.timeline.seq_len
        )
        position = self.positions[self.timeline.moments.index(found.moment)]
        held = [x for x in self.held if x.cause not in ONLY_OF_SEVERAL or self.world_size > 1]
        held += of_attention(self.values, layers)
        return MemoryPlan(
            parts=memory_parts(found),
            by_block=_by_block([x for x in held if x.at(position)]),
            over_program=_over_program(held, len(self.values.nodes), found.causes.get(ROWS, 0)),
            unknown=self.unknown,
            timeline=self.timeline,
        )


def _alive_at_moments(
    values: Values,
    held: Sequence[Held],
    readers: Mapping[Node, Sequence[Node]],
    growth: Growth,
    *,
    world_size: int,
    reuses: bool,
    unknown: tuple[str, ...],
) -> Alive:
    terms, table = _table(held, len(values.nodes), growth, reuses=reuses)
    attentions = [n for n in values.nodes if n.op == "call_function" and n.target is attention]
    number = {node: i for i, node in enumerate(attentions)}
    masks = _masks(values, readers, number, growth)
    moments = _moments(values, number, [*readers], table)
    kept = pruned(terms, moments)
    timeline = MemoryTimeline(
        seq_len=max((_spec(call).kv_len for call in attentions), default=1),
        terms=terms,
        moments=tuple(moments[i] for i in kept),
        layers=tuple(
            MemoryLayer(node=n.name, keeps_result=keeps_result(n, values)) for n in attentions
        ),
        masks=masks,
    )
    return Alive(
        timeline=timeline, positions=tuple(kept), values=values, held=tuple(held),
        world_size=world_size, unknown=unknown,
    )  # fmt: skip


def _table(
    held: Sequence[Held], num: int, growth: Growth, *, reuses: bool
) -> tuple[tuple[MemoryTerm, ...], NDArray[np.int64]]:
    """Bytes of all ranks together: a row for each position, a column for each term."""
    alike: dict[tuple[MemoryTerm, int], list[Held]] = {}
    for x in held:
        size = (x.all_ranks or x.bytes) if x.of is None else num_bytes(x.of)
        if size:
            alike.setdefault((growth.term(x), size), []).append(replace(x, bytes=size))
    columns: dict[MemoryTerm, NDArray[np.int64]] = {}
    same_size: dict[tuple[MemoryTerm, int], NDArray[np.int64]] = {}
    for (term, size), members in alike.items():
        now = _alive(members, num)
        columns[term] = columns.get(term, 0) + now
        if reuses and term.cause in REUSED:
            key = replace(term, cause=REUSE), size
            same_size[key] = same_size.get(key, 0) + now
    for (term, _), now in same_size.items():
        columns[term] = columns.get(term, 0) + _idle(now)
    terms = tuple(columns)
    return terms, np.stack([columns[t] for t in terms], axis=1) if terms else np.zeros(
        (num, 0), np.int64
    )


def _idle(now: NDArray[np.int64]) -> NDArray[np.int64]:
    """What is held for reuse of buffers of one size, of which so much is in use."""
    before = np.maximum.accumulate(now[::-1])[::-1]
    idle: NDArray[np.int64] = np.minimum(before, np.maximum.accumulate(now)) - now
    return idle


def _moments(
    values: Values,
    number: Mapping[Node, int],
    masks: Sequence[Node],
    table: NDArray[np.int64],
) -> list[MemoryMoment]:
    """Every position as one."""
    again = [(number[node], first, last) for node, first, last in again_ranges(values, number)]
    made = {node: i for i, node in enumerate(values.nodes)}
    found: list[MemoryMoment] = []
    layers = 0
    for i, node in enumerate(values.nodes):
        layers += node in number and bool(values.has_grad)
        works = node in number and (node in values.has_grad or not values.has_grad)
        found.append(
            MemoryMoment(
                operator=op_name(node),
                where=node.meta.get("ringfx_path") or node.name,
                bytes=tuple(table[i].tolist()),
                layers=layers,
                masks=sum(made[mask] <= i for mask in masks) if values.has_grad else 0,
                working=(number[node],) if works else (),
                again=tuple(layer for layer, first, last in again if first <= i <= last),
            )
        )
    return found


def _masks(
    values: Values,
    readers: Mapping[Node, Sequence[Node]],
    number: Mapping[Node, int],
    growth: Growth,
) -> tuple[MemoryMask, ...]:
    kept = kept_values(values) if readers and values.has_grad else frozenset()
    return tuple(
        MemoryMask(
            bytes=num_bytes(mask),
            tokens=growth.power(mask),
            readers=tuple(number[call] for call in calls),
            is_kept=mask in kept and mask not in values.region,
        )
        for mask, calls in readers.items()
    )


def _given_masks(graph: Graph, parameters: Sequence[Node]) -> Collection[Node]:
    """Inputs and buffers that attention reads as they stand, or cut: whole on every rank."""
    found = (given_input(x) for call in _attentions(graph) for x in _read(call))
    return {x for x in found if x is not None and x not in parameters}


def _powers_by_reads(graph: Graph) -> Mapping[Node, int]:
    """The power of the length that what attention reads grows with: the dims that are indexed by
    queries or keys. A mask that is given has no other tie to the tokens."""
    found: dict[Node, int] = {}
    for call in _attentions(graph):
        spec = _spec(call)
        for at in tiles.reads(spec.keep, spec.bias):
            value = _read(call)[at[1]]
            power = sum(size > 1 and _by_tokens(e) for size, e in _dims(value, at[2:]))
            given = given_input(value)
            whole = given if given is not None and num_bytes(given) == num_bytes(value) else value
            for node in (value, whole):
                found[node] = max(found.get(node, 0), power)
    return found


def _dims(value: Node, index: Sequence[tiles.Expr]) -> Iterable[tuple[int, tiles.Expr]]:
    return zip(value.meta["val"].shape, index, strict=False)


def _by_tokens(index: tiles.Expr) -> bool:
    return any(e in (tiles.Q, tiles.K) for e in tiles.walk(index))


def _readers(graph: Graph, carries_tokens: Callable[[Node], bool]) -> Mapping[Node, Sequence[Node]]:
    """Whole masks and biases of which each rank takes the rows of its queries, once for all, with
    the attentions that read them; in the order of the program."""
    found: dict[Node, list[Node]] = {}
    for call in _attentions(graph):
        spec = _spec(call)
        for i in tiles.matrix_rows(spec.keep, spec.bias):
            value = _read(call)[i]
            if not carries_tokens(value) and call not in found.setdefault(value, []):
                found[value].append(call)
    return {node: found[node] for node in graph.nodes if found.get(node)}


def _spec(call: Node) -> AttentionSpec:
    return AttentionSpec.from_json(str(call.kwargs["spec"]))


def _attentions(graph: Graph) -> list[Node]:
    return graph.find_nodes(op="call_function", target=attention)


def _read(call: Node) -> Sequence[Node]:
    """What the tile functions of an attention read."""
    read: Any = call.args[3]
    return tuple(read)


def _by_block(alive: Iterable[Held]) -> tuple[tuple[str, int], ...]:
    """Bytes by block, in program order: a path up to its first number, or all of it."""
    blocks: dict[str, int] = {}
    for x in sorted(alive, key=lambda x: x.first):
        if CAUSES[x.cause] != "whole":
            path = x.node.meta.get("ringfx_path", "")
            match = re.match(r".*?\.\d+(?=\.|$)", path)
            name = match[0] if match else path
            blocks[name] = blocks.get(name, 0) + x.bytes
    return tuple((name or "elsewhere", size) for name, size in blocks.items() if size)


STRETCHES = 60
"""Points of a chart of memory over the program."""


def _over_program(held: Sequence[Held], num: int, rows: int) -> tuple[int, ...]:
    """Without what Inductor holds for reuse, and with the rows that are taken of masks."""
    stretches = np.array_split(_alive(held, num), min(num, STRETCHES))
    return tuple(int(stretch.max()) + rows for stretch in stretches)


# --- sums ---------------------------------------------------------------------------------------


REUSED = frozenset(
    {
        KEPT,
        AGAIN,
        "gradients of activations",
        "temporaries",
    }
)


def _alive(held: Iterable[Held], num: int) -> NDArray[np.int64]:
    """Bytes alive at each position."""
    changes = np.zeros(num + 1, np.int64)
    for x in held:
        changes[x.first] += x.bytes
        changes[x.last + 1] -= x.bytes
    total: NDArray[np.int64] = changes.cumsum()[:num]
    return total
