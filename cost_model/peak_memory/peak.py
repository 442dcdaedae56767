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
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, Node

from ringfx.comm.state_ranks import ONE_RANK, StateRanks
from ringfx.cost_model.peak_memory.alive import (
    Alive,
    Growth,
    Run,
    Segments,
    alive_at_moments,
    numbers,
    run_of,
)
from ringfx.cost_model.peak_memory.liveness import Values, kept_values, values_of
from ringfx.cost_model.peak_memory.optimizers import state_bytes
from ringfx.cost_model.peak_memory.segments import (
    again_nodes,
    handed_on,
    leaving_of,
    recomputed,
    segments_of,
)
from ringfx.cost_model.peak_memory.timeline_of import (
    Held,
    Sharded,
    num_bytes,
    of_activations,
    of_states,
)
from ringfx.ir import tiles
from ringfx.ir.attention_spec import AttentionSpec
from ringfx.ir.memory_plan import (
    MemoryMask,
    MemoryPlan,
)
from ringfx.ir.memory_timeline import (
    GIVEN,
)
from ringfx.ir.plan import LayerPlan
from ringfx.ir.values import Captured
from ringfx.ops import attention
from ringfx.passes.axes.call import given_input
from ringfx.passes.capture.gradients import needs_grad

__all__ = ["Step", "predict_memory", "step_of"]


def predict_memory(
    captured: Captured,
    *,
    carries_tokens: Callable[[Node], bool],
    layers: Mapping[str, LayerPlan],
    world_size: int,
    optimizer: str | int = "none",
    compiler: str = "aot_eager",
) -> MemoryPlan:
    """The peak of a step under a choice of strategies."""
    step = step_of(
        captured, carries_tokens=carries_tokens, power=lambda node: int(carries_tokens(node)),
        world_size=world_size, compiler=compiler,
    )  # fmt: skip
    return step.alive(optimizer=optimizer).plan(layers)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Mode:
    values: Values
    activations: tuple[Held, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class Step:
    """What a step computes and keeps, whatever its strategies and its states."""

    captured: Captured
    kept: _Mode
    """Every segment is kept for backward."""
    again: _Mode | None
    """Every one is computed again; None: there is none."""
    segments: Segments
    growth: Growth
    readers: Mapping[Node, Sequence[Node]]
    """Whole masks, and the attentions that read rows of them."""
    world_size: int
    reuses: bool
    """Whether free buffers are held for reuse."""

    def alive(
        self,
        *,
        optimizer: str | int = "none",
        states: Collection[int] = (),
        state_ranks: StateRanks = ONE_RANK,
    ) -> Alive:
        """What is alive when.

        Parameters
        ----------
        optimizer
            A name of ``optimizers.OPTIMIZERS``, or bytes of state for each parameter.
        states
            Inputs (parameters) of which each rank holds its rows.
        state_ranks
            The ranks that hold them.
        """
        graph = self.captured.graph_module.graph
        inputs = graph.find_nodes(op="placeholder")
        owned = zip(inputs, self.captured.is_parameter, strict=True)
        parameters = [n for n, is_one in owned if is_one]
        trained = [n for n in parameters if needs_grad(n)]
        sharded = Sharded(nodes=frozenset(inputs[i] for i in states), ranks=state_ranks)

        def parameter(n: Node) -> Held:
            if n in sharded.nodes:
                return sharded.held("parameters", n, 0)
            return Held(cause="parameters", node=n, bytes=num_bytes(n))

        def optimizer_state(n: Node) -> Held:
            value: torch.Tensor = n.meta["val"]
            if n not in sharded.nodes:
                size = state_bytes(optimizer, value.numel(), value.element_size())
                return Held(cause="optimizer state", node=n, bytes=size)
            each = state_ranks.bytes_kept(value) // max(value.numel(), 1)
            size = state_bytes(optimizer, value.numel(), each)
            return sharded.held("optimizer state", n, 0, size)

        masks = _given_masks(graph, parameters)
        always = [
            *map(parameter, parameters),
            *(Held(cause=GIVEN, node=n, bytes=num_bytes(n), of=n) for n in masks),
            *map(optimizer_state, trained),
        ]
        last = len(self.kept.values.nodes) - 1

        def run(mode: _Mode) -> Run:
            held = [
                *of_states(mode.values, trained, sharded),
                *mode.activations,
                *(replace(x, last=last) for x in always),
            ]
            return run_of(mode.values, held, self.readers, self.growth, reuses=self.reuses)

        return alive_at_moments(
            run(self.kept),
            run(self.again) if self.again else None,
            self.segments,
            _masks(self.kept.values, self.readers, self.growth),
            world_size=self.world_size,
            unknown=("optimizer state",) if trained and optimizer == "none" else (),
        )


def step_of(
    captured: Captured,
    *,
    carries_tokens: Callable[[Node], bool],
    power: Callable[[Node], int],
    world_size: int,
    compiler: str = "aot_eager",
    again_ms: Callable[[Collection[Node]], float] | None = None,
) -> Step:
    """What a step computes and keeps.

    Parameters
    ----------
    captured
        The program with global shapes.
    carries_tokens
        Whether a value is split over the ranks; of one rank: whether it would be.
    power
        The power of the sequence's length that a value grows with.
    compiler
        ``inductor`` holds buffers for reuse; ``eager`` keeps all that backwards need, and runs
        nothing again.
    again_ms
        What running some nodes again takes, of all ranks together; None: nothing is computed again
        but what the user checkpoints.
    """
    graph = captured.graph_module.graph
    has_grad = {n: needs_grad(n) for n in graph.find_nodes(op="placeholder")}

    def size(node: Node) -> int:
        return math.ceil(num_bytes(node) / (world_size if carries_tokens(node) else 1))

    readers = _readers(graph, carries_tokens)
    values = replace(values_of(graph, size, has_grad), taken=frozenset(readers))
    if compiler == "eager":
        values = replace(values, region={})
    everything, in_place = compiler == "eager", compiler == "inductor"
    by_reads = _powers_by_reads(graph)
    found = () if everything or not again_ms else segments_of(values)
    nodes_again = {s: recomputed(s, values) for s in found}
    regions = {n: s.number + 1 for s, nodes in nodes_again.items() for n in nodes}
    around = {s.attention: s.number + 1 for s in found}
    once = frozenset(n for s in found for n in leaving_of(s, values))
    again = replace(values, region=regions, around=around, once=once) if regions else None
    segments = Segments(segments=found, again=nodes_again)
    if again is not None and again_ms is not None:
        segments = replace(
            segments,
            again_ms={s: again_ms(again_nodes(s, again, nodes_again[s])) for s in found},
            moved={s: handed_on(s, segments.behind(s), again) for s in found},
        )

    def mode(values: Values) -> _Mode:
        held = of_activations(values, everything=everything, in_place=in_place)
        return _Mode(values=values, activations=tuple(held))

    return Step(
        captured=captured, kept=mode(values), again=mode(again) if again else None,
        segments=segments,
        growth=Growth(
            power=lambda n: max(power(n), by_reads.get(n, 0)), is_split=carries_tokens
        ),
        readers=readers, world_size=world_size, reuses=in_place,
    )  # fmt: skip


def _masks(
    values: Values, readers: Mapping[Node, Sequence[Node]], growth: Growth
) -> tuple[MemoryMask, ...]:
    number = numbers(values)
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
        for at in tiles.reads(*spec.functions):
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
        for i in tiles.matrix_rows(*spec.functions):
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
