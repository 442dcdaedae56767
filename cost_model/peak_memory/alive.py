"""What is alive at every moment of a step, as a timeline of which peaks are taken.

A step is looked at twice: with every segment kept for backward, and with every one computed again
(``segments.py``). What a segment keeps is apart from what lies within it, so that the timeline
answers for any choice of segments.

Inductor gives a buffer that is free to the next value of its size and never returns one that it
will give away again, so for each size it holds the larger of what it needs now and the smaller of
the most it needed and the most it will.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch.fx import Node

from ringfx.cost_model.peak_memory.liveness import Values, block_of
from ringfx.cost_model.peak_memory.segments import Segment, tag
from ringfx.cost_model.peak_memory.timeline_of import (
    AGAIN,
    Held,
    again_ranges,
    keeps_result,
    num_bytes,
    of_attention,
)
from ringfx.cost_model.prediction.products import op_name
from ringfx.ir.attention_spec import AttentionSpec
from ringfx.ir.memory_peaks import Peaks
from ringfx.ir.memory_plan import (
    MemoryLayer,
    MemoryMask,
    MemoryMoment,
    MemoryPlan,
    MemorySegment,
    MemoryTerm,
    MemoryTimeline,
)
from ringfx.ir.memory_timeline import (
    CAUSES,
    GIVEN,
    KEPT,
    ONLY_OF_SEVERAL,
    REUSE,
    memory_parts,
    peak,
    pruned,
)
from ringfx.ir.plan import LayerPlan
from ringfx.ops import attention

__all__ = ["Alive", "Growth", "Run", "Segments", "alive_at_moments", "numbers", "run_of"]


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
class Run:
    """A step in which every segment is kept, or every one computed again."""

    values: Values
    held: tuple[Held, ...]
    terms: tuple[MemoryTerm, ...]
    table: NDArray[np.int64]
    """Bytes of all ranks together: a row for each position, a column for each term."""
    moments: tuple[MemoryMoment, ...]
    """Every position as one."""
    kept: Callable[[int, int, Collection[Node] | None], Sequence[int]]
    """Of each term, what the positions from one up to before another keep; of some values only."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Segments:
    """What may be computed again, and what that takes."""

    segments: tuple[Segment, ...] = ()
    again: Mapping[Segment, frozenset[Node]] = field(default_factory=dict)
    again_ms: Mapping[Segment, float] = field(default_factory=dict)
    """Milliseconds of all ranks together."""
    moved: Mapping[Segment, frozenset[Node]] = field(default_factory=dict)
    """What each hands on and may wait in the host's memory."""

    def behind(self, segment: Segment) -> Segment | None:
        """The segment after it."""
        return next((s for s in self.segments if s.number == segment.number + 1), None)


@dataclass(frozen=True, eq=False, kw_only=True)
class Alive:
    """What is alive when in a program: its timeline, and what the chart and blocks are made of."""

    timeline: MemoryTimeline
    everywhere: tuple[tuple[int, MemoryMoment], ...]
    """Every position with its moment: the timeline has those of them that may be the largest."""
    kept: Run
    again: Run | None
    segments: Segments
    world_size: int
    unknown: tuple[str, ...]

    def plan(self, layers: Mapping[str, LayerPlan]) -> MemoryPlan:
        """The peak under these layers, by the name of their nodes; those that are missing count
        nothing, which gives what there is outside attention."""
        chosen = [layers.get(layer.node) for layer in self.timeline.layers]
        found = peak(
            self.timeline, chosen, world_size=self.world_size, seq_len=self.timeline.seq_len
        )
        position = next(i for i, moment in self.everywhere if moment is found.moment)
        values = self.kept.values
        if any(layer.recomputed for layer in layers.values()):
            regions = self._regions(layers)
            around = {s.attention: s.number + 1 for s in self.segments.segments}
            values = replace(values, region=regions, around=around)
        held = [x for x in self._held(layers) if x.cause not in ONLY_OF_SEVERAL or self.several]
        ends = {s.attention: s.stop - 1 for s in self.segments.segments}
        held += of_attention(values, layers, ends)
        return MemoryPlan(
            parts=memory_parts(found),
            by_block=_by_block([x for x in held if x.at(position)]),
            over_program=self._over_program(chosen, found.bytes),
            unknown=self.unknown,
            timeline=self.timeline,
        )

    def _over_program(self, layers: Sequence[LayerPlan | None], most: int) -> tuple[int, ...]:
        """The largest sum in each of some equal stretches: what the peak is the largest of."""
        every = replace(self.timeline, moments=tuple(moment for _, moment in self.everywhere))
        peaks = Peaks(
            every, [[x] for x in layers], world_size=self.world_size, seq_len=every.seq_len
        )
        sums = peaks.at_moments(np.zeros((1, len(layers)), np.int64))[0]
        found = np.zeros(len(self.kept.values.nodes), np.int64)
        np.maximum.at(found, [i for i, _ in self.everywhere], sums)
        # Each term is rounded up, so a moment that the timeline left out may be bytes larger.
        found = np.minimum(found, most)
        return tuple(int(x.max()) for x in np.array_split(found, min(len(found), STRETCHES)))

    @property
    def several(self) -> bool:
        return self.world_size > 1

    def tag(self, layers: Iterable[LayerPlan], of: Callable[[Node], Iterable[Node]]) -> None:
        """Tell the compiler which layers are computed again; ``of`` gives the nodes of the program
        that is compiled."""
        chosen = {layer.site.node: layer for layer in layers if layer.recomputed}
        for segment in self.segments.segments:
            layer = chosen.get(segment.attention.name)
            if layer is not None:
                again, moved = self.segments.again[segment], set[Node]()
                if layer.offloaded:
                    moved |= self.segments.moved[segment]
                    moved |= {segment.attention} if layer.host_result_bytes else set()
                tag(
                    segment, again, of, attention_again=layer.attention_again, offloaded=moved,
                )  # fmt: skip

    def _regions(self, layers: Mapping[str, LayerPlan]) -> Mapping[Node, int]:
        chosen = [s for s in self.segments.segments if layers[s.attention.name].recomputed]
        return {n: s.number + 1 for s in chosen for n in self.segments.again[s]}

    def _held(self, layers: Mapping[str, LayerPlan]) -> Sequence[Held]:
        """Of each segment what it holds as it was chosen."""
        again = [s for s in self.segments.segments if layers[s.attention.name].recomputed]
        if not again or self.again is None:
            return self.kept.held
        chosen = {n for s in again for n in s.nodes}
        back: dict[Node, int] = {}  # from where on what is offloaded is there
        for s in again:
            if layers[s.attention.name].offloaded and (following := self.segments.behind(s)):
                back |= dict.fromkeys(self.segments.moved[s], following.stop - 1)
        kept = (x for x in self.kept.held if x.node not in chosen)
        own = (x for x in self.again.held if x.node in chosen)
        return [
            replace(x, last=min(x.last, back[x.of])) if x.cause == KEPT and x.of in back else x
            for x in (*kept, *own)
        ]


def run_of(
    values: Values,
    held: Sequence[Held],
    readers: Mapping[Node, Sequence[Node]],
    growth: Growth,
    *,
    reuses: bool,
) -> Run:
    num = len(values.nodes)
    terms, table = _table(held, num, growth, reuses=reuses)
    kept = [x for x in held if x.cause == KEPT and x.last == num - 1 and x.of is not None]
    columns = {term: i for i, term in enumerate(terms)}

    def kept_between(start: int, stop: int, only: Collection[Node] | None) -> Sequence[int]:
        sizes = [0] * len(terms)
        for x in kept:
            if start <= x.first < stop and x.of is not None and (only is None or x.of in only):
                sizes[columns[growth.term(x)]] += num_bytes(x.of)
        return sizes

    return Run(
        values=values, held=tuple(held), terms=terms, table=table, kept=kept_between,
        moments=tuple(_moments(values, numbers(values), [*readers], table)),
    )  # fmt: skip


def numbers(values: Values) -> Mapping[Node, int]:
    """The attentions, counted."""
    calls = [n for n in values.nodes if n.op == "call_function" and n.target is attention]
    return {node: i for i, node in enumerate(calls)}


def alive_at_moments(
    kept: Run,
    again: Run | None,
    segments: Segments,
    masks: tuple[MemoryMask, ...],
    *,
    world_size: int,
    unknown: tuple[str, ...],
) -> Alive:
    number = numbers(kept.values)
    terms = tuple(dict.fromkeys((*kept.terms, *(again.terms if again else ()))))
    found = [*_of_mode(kept, terms, segments, "kept" if again else "")]
    found += _of_mode(again, terms, segments, "again") if again else []
    chosen = pruned(terms, [moment for _, moment in found])
    timeline = MemoryTimeline(
        seq_len=max((_kv_len(call) for call in number), default=1),
        terms=terms,
        moments=tuple(found[i][1] for i in chosen),
        layers=tuple(
            MemoryLayer(node=n.name, keeps_result=keeps_result(n, kept.values)) for n in number
        ),
        masks=masks,
        segments=tuple(
            MemorySegment(
                layer=number[s.attention],
                kept=_widened(kept, terms, kept.kept(s.start, s.stop, None)),
                kept_again=_widened(again, terms, again.kept(s.start, s.stop, None)),
                offloaded=_widened(
                    again,
                    terms,
                    again.kept(s.start, s.stop, segments.moved[s]),
                ),
                again_ms=segments.again_ms[s],
            )
            for s in (segments.segments if again else ())
            if again
        ),
    )
    return Alive(
        timeline=timeline, everywhere=tuple(found), kept=kept, again=again, segments=segments,
        world_size=world_size, unknown=unknown,
    )  # fmt: skip


def _widened(run: Run, terms: Sequence[MemoryTerm], sizes: Sequence[int]) -> tuple[int, ...]:
    """Bytes of a run's terms as those of all terms."""
    by_term = dict(zip(run.terms, sizes, strict=True))
    return tuple(int(by_term.get(term, 0)) for term in terms)


def _of_mode(
    run: Run, terms: Sequence[MemoryTerm], segments: Segments, mode: Literal["", "kept", "again"]
) -> Iterator[tuple[int, MemoryMoment]]:
    """The moments of a run, and where they are, without what segments before their own keep.

    Outside of segments both runs are alike.
    """
    sizes = np.zeros((len(run.table), len(terms)), np.int64)
    sizes[:, [terms.index(term) for term in run.terms]] = run.table
    ended, before = iter(segments.segments if mode else ()), np.zeros(len(terms), np.int64)
    number, here = 0, next(ended, None)
    for i, moment in enumerate(run.moments):
        if here is not None and here.stop <= i:
            before = before + np.array(_widened(run, terms, run.kept(here.start, here.stop, None)))
            number, here = number + 1, next(ended, None)
        is_within = here is not None and here.start <= i
        if mode == "again" and not is_within:
            continue
        yield i, replace(
            moment, bytes=tuple((sizes[i] - before).tolist()), segments=number,
            mode=mode if is_within else "",
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


def _by_block(alive: Iterable[Held]) -> tuple[tuple[str, int], ...]:
    """Bytes by block, in program order: a path up to its first number, or all of it."""
    blocks: dict[str, int] = {}
    for x in sorted(alive, key=lambda x: x.first):
        if CAUSES[x.cause] != "whole":
            name = block_of(x.node)
            blocks[name] = blocks.get(name, 0) + x.bytes
    return tuple((name or "elsewhere", size) for name, size in blocks.items() if size)


STRETCHES = 60
"""Points of a chart of memory over the program."""


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


def _kv_len(call: Node) -> int:
    return AttentionSpec.from_json(str(call.kwargs["spec"])).kv_len
