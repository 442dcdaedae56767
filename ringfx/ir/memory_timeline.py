"""The peak of memory, taken again for any length, number of ranks and choice of strategies.

With S and S0 the length and the one that the bytes were counted for, p ranks, and at moment m of
the program b(m, i) bytes of a term i that grows with the d(i)-th power of the length:

    peak = max over m of  sum over i of b(m, i) (S / S0)^d(i) / (p if i is split else 1)
                          + what the layers before m keep + the workspace of the layer at m
                          + rows of masks, or masks

So a plan that keeps b answers for all of them alike, and moments that never are the largest are
left out (``pruned``). Where segments may be computed again, a moment leaves out what the segments
before its own keep: that is added for the segments as they were chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol, TypeVar

import numpy as np

from ringfx.ir.memory_plan import (
    Kind,
    MemoryLayer,
    MemoryMask,
    MemoryMoment,
    MemoryPart,
    MemorySegment,
    MemoryTerm,
    MemoryTimeline,
)
from ringfx.ir.values import AttentionSite

__all__ = [
    "AGAIN_FOR_ATTENTION", "CAUSES", "CHUNK", "GATHERED", "GIVEN", "KEPT", "KEPT_BY_ATTENTION",
    "MESSAGES", "ONLY_OF_SEVERAL", "REUSE", "ROWS", "WORKSPACE", "FixedParts", "Held", "Peak",
    "SegmentBytes", "fixed_parts", "flat", "in_order", "least_peak", "memory_parts", "never_below",
    "outside_peak", "peak", "pruned", "segment_bytes", "whole_bytes",
]  # fmt: skip

GIVEN = "dense input masks"
KEPT = "activations saved for backward"
KEPT_BY_ATTENTION = "saved by attention"
AGAIN_FOR_ATTENTION = "recomputed for attention"
WORKSPACE = "attention's workspace"
ROWS = "rows of dense masks"
MESSAGES = "gradient buckets"
GATHERED = "gathered parameters"
ONLY_OF_SEVERAL = (MESSAGES, GATHERED)
"""Only where there is more than one rank."""
REUSE = "held by Inductor for reuse"
CHUNK = "one chunk at a time"

CAUSES: Mapping[str, Kind] = {
    "parameters": "whole",
    GIVEN: "whole",
    ROWS: "split",
    "optimizer state": "whole",
    "parameter gradients": "whole",
    MESSAGES: "whole",
    "sharded parameters": "split",
    "sharded optimizer state": "split",
    "sharded parameter gradients": "split",
    GATHERED: "whole",
    KEPT: "split",
    "recomputed for checkpoints": "split",
    KEPT_BY_ATTENTION: "attention",
    AGAIN_FOR_ATTENTION: "attention",
    "gradients of activations": "split",
    "temporaries": "split",
    CHUNK: "split",
    REUSE: "split",
    WORKSPACE: "attention",
    "outside attention": "split",
}
"""The causes of memory, in the order in which plans print them."""


T = TypeVar("T")


class Held(Protocol):
    """Bytes of a layer under one strategy: a ``LayerPlan``, a ``Prediction``."""

    @property
    def saved_bytes(self) -> int: ...
    @property
    def result_bytes(self) -> int: ...
    @property
    def workspace_bytes(self) -> int: ...
    @property
    def own_queries(self) -> bool: ...
    @property
    def recomputed(self) -> bool: ...
    @property
    def attention_again(self) -> bool: ...
    @property
    def offloaded(self) -> bool: ...
    @property
    def host_result_bytes(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The largest moment and its bytes by cause."""

    moment: MemoryMoment
    causes: Mapping[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.causes.values())


def peak(
    timeline: MemoryTimeline, layers: Sequence[Held | None], *, world_size: int, seq_len: int
) -> Peak:
    """The largest moment.

    Parameters
    ----------
    layers
        What each layer of the timeline holds, in its order, and whether its segment is computed
        again; None: nothing, and it is.
    """
    at = _At(timeline, layers, world_size, seq_len)
    largest = max(at.there(), key=at.total)
    return Peak(moment=timeline.moments[largest], causes=at.causes(largest))


def least_peak(
    timeline: MemoryTimeline, layers: Sequence[Held | None], *, world_size: int, seq_len: int
) -> int:
    """Bytes that no choice of segments goes below: each of them as if all before it were computed
    again, itself as it holds less."""
    at = _At(timeline, [None if x is None else _Again(x) for x in layers], world_size, seq_len)
    largest: dict[tuple[int, str], int] = {}
    for i, moment in enumerate(timeline.moments):
        key = moment.segments, moment.mode
        largest[key] = max(largest.get(key, 0), at.total(i))
    least: dict[tuple[int, bool], int] = {}
    for (segments, mode), size in largest.items():
        place = segments, mode == ""
        least[place] = min(least.get(place, size), size)
    return max(least.values(), default=0)


@dataclass(frozen=True)
class _Again:
    """A layer as its segment is computed again."""

    held: Held
    recomputed: bool = True
    attention_again: bool = True
    offloaded: bool = True
    host_result_bytes: int = 0

    @property
    def saved_bytes(self) -> int:
        return self.held.saved_bytes

    @property
    def result_bytes(self) -> int:
        return self.held.result_bytes

    @property
    def workspace_bytes(self) -> int:
        return self.held.workspace_bytes

    @property
    def own_queries(self) -> bool:
        return self.held.own_queries


def memory_parts(found: Peak) -> tuple[MemoryPart, ...]:
    """A peak as a plan prints it."""
    where = found.moment.where
    details = {
        "temporaries": f"{found.moment.operator} of {where}", CHUNK: where, WORKSPACE: where
    }  # fmt: skip
    named: Mapping[str, tuple[str, Kind]] = {
        name: (cause, kind)
        for cause, usual in CAUSES.items()
        for name, kind in ((cause, usual), (f"{cause}, replicated", "replicated"))
    }
    return tuple(
        MemoryPart(cause=name, bytes=size, kind=kind, detail=details.get(cause, ""))
        for name, (cause, kind) in named.items()
        if (size := found.causes.get(name, 0))
    )


def in_order(
    timeline: MemoryTimeline, sites: Sequence[AttentionSite], held: Sequence[T]
) -> list[T | None]:
    """What belongs to the sites, in the order of the timeline's layers."""
    by_node = {site.node: x for site, x in zip(sites, held, strict=True)}
    return [by_node.get(layer.node) for layer in timeline.layers]


def outside_peak(timeline: MemoryTimeline, *, world_size: int, seq_len: int) -> Peak:
    """The peak of what is there outside attention."""
    nothing = [None] * len(timeline.layers)
    return peak(timeline, nothing, world_size=world_size, seq_len=seq_len)


def never_below(timeline: MemoryTimeline, *, world_size: int, seq_len: int) -> int:
    """A bound that no choice of strategies goes below."""
    nothing = [None] * len(timeline.layers)
    return least_peak(timeline, nothing, world_size=world_size, seq_len=seq_len)


def whole_bytes(timeline: MemoryTimeline) -> Mapping[str, int]:
    """The most that is there at one moment whatever the length and number of ranks, by cause."""
    fixed = [
        i for i, t in enumerate(timeline.terms)
        if not t.tokens and not t.is_split and t.cause not in ONLY_OF_SEVERAL
    ]  # fmt: skip
    moment = max(timeline.moments, key=lambda moment: sum(moment.bytes[i] for i in fixed))
    found: dict[str, int] = {}
    for i in fixed:
        cause = timeline.terms[i].cause
        found[cause] = found.get(cause, 0) + moment.bytes[i]
    return {cause: found[cause] for cause in CAUSES if found.get(cause)}


@dataclass(frozen=True, kw_only=True)
class SegmentBytes:
    """What one segment keeps outside attention, in bytes of one rank."""

    kept: int
    again: int
    """Where it is computed again."""
    moved: int
    """Of that, what it can leave in the host's memory."""


def segment_bytes(
    timeline: MemoryTimeline, *, world_size: int, seq_len: int
) -> tuple[SegmentBytes, ...]:
    """Of each segment."""
    at = _At(timeline, [None] * len(timeline.layers), world_size, seq_len)
    return tuple(
        SegmentBytes(
            kept=sum(at.scaled(segment.kept)),
            again=sum(at.scaled(segment.kept_again)),
            moved=sum(at.moved(segment)),
        )
        for segment in timeline.segments
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class FixedParts:
    """What of a timeline's sums no choice changes, in bytes of one rank."""

    moments: Sequence[int]
    rows: Sequence[int]
    """Of each mask the rows that a rank takes where it takes any."""
    masks: Sequence[int]
    """Of each mask what is kept where it takes none."""


def fixed_parts(timeline: MemoryTimeline, *, world_size: int, seq_len: int) -> FixedParts:
    at = _At(timeline, [None] * len(timeline.layers), world_size, seq_len)
    sizes = [at.mask(mask) for mask in timeline.masks]
    return FixedParts(
        moments=[sum(at.scaled(moment.bytes)) for moment in timeline.moments],
        rows=[rows for rows, _ in sizes],
        masks=[whole for _, whole in sizes],
    )


class _At:
    """A timeline at one length, number of ranks and choice."""

    def __init__(
        self,
        timeline: MemoryTimeline,
        layers: Sequence[Held | None],
        world_size: int,
        seq_len: int,
    ) -> None:
        self._timeline, self._layers = timeline, layers
        self._world_size, self._seq_len = world_size, seq_len
        self._factors = [self._factor(term) for term in timeline.terms]
        self._again_of = [
            held is None or held.recomputed
            for held in (layers[segment.layer] for segment in timeline.segments)
        ]
        self._is_again = {
            segment.layer
            for segment, again in zip(timeline.segments, self._again_of, strict=True)
            if again
        }
        self._before = self._kept_before()
        kept = (self._kept(i, held) for i, held in enumerate(layers))
        self._kept_so_far = [0, *accumulate(kept)]
        takes = [world_size > 1 and _takes_rows(mask, layers) for mask in timeline.masks]
        sizes = [self.mask(mask) for mask in timeline.masks]
        pairs = list(zip(takes, sizes, strict=True))
        self._rows = sum(rows for taken, (rows, _) in pairs if taken)
        self._masks_so_far = [0, *accumulate(0 if taken else kept for taken, (_, kept) in pairs)]

    def mask(self, mask: MemoryMask) -> tuple[int, int]:
        """The rows that a rank takes of it, and what is kept of it where none does."""
        rows = self._scaled(mask.bytes, mask.tokens, split=True)
        whole = self._scaled(mask.bytes, mask.tokens, split=False) if mask.is_kept else 0
        return rows, whole

    def _factor(self, term: MemoryTerm) -> tuple[int, int]:
        if term.cause in ONLY_OF_SEVERAL and self._world_size == 1:
            return 0, 1
        ranks = self._world_size if term.is_split else 1
        return self._seq_len**term.tokens, self._timeline.seq_len**term.tokens * ranks

    def _name(self, term: MemoryTerm) -> str:
        """Of what is split in general, what every rank has whole goes by a name of its own."""
        whole = self._world_size > 1 and term.tokens > 0 and not term.is_split
        whole = whole and CAUSES.get(term.cause) == "split"
        return f"{term.cause}, replicated" if whole else term.cause

    def _scaled(self, size: int, tokens: int, *, split: bool) -> int:
        over, under = self._factor(MemoryTerm(cause="", tokens=tokens, is_split=split))
        return -(-size * over // under)

    def there(self) -> Iterator[int]:
        """The moments that there are, by number."""
        for i, moment in enumerate(self._timeline.moments):
            if not moment.mode or self._again_of[moment.segments] is (moment.mode == "again"):
                yield i

    def scaled(self, sizes: Sequence[int]) -> list[int]:
        """Bytes of each term on one rank."""
        pairs = zip(sizes, self._factors, strict=True)
        return [-(-size * over // under) for size, (over, under) in pairs]

    def _kept_before(self) -> list[list[int]]:
        """Of each term, what the first segments keep: of none, of one, of two.

        What the last of them offloaded is back: the segment behind it is computed again of that.
        """
        here = [0] * len(self._timeline.terms)
        found = [here]
        for segment, again in zip(self._timeline.segments, self._again_of, strict=True):
            own = self.scaled(segment.kept_again if again else segment.kept)
            found.append([a + b for a, b in zip(here, own, strict=True)])
            held = self._layers[segment.layer]
            is_moved = again and (held is None or held.offloaded)
            moved = self.moved(segment) if is_moved else [0] * len(own)
            here = [a - b for a, b in zip(found[-1], moved, strict=True)]
        return found

    def moved(self, segment: MemorySegment) -> list[int]:
        return self.scaled(segment.offloaded or [0] * len(self._timeline.terms))

    def _kept(self, number: int, held: Held | None) -> int:
        if held is None:
            return 0
        if number in self._is_again and held.attention_again:
            return 0
        is_again = self._timeline.layers[number].keeps_result or number in self._is_again
        result = held.result_bytes - held.host_result_bytes
        return result if is_again else held.saved_bytes

    def _back(self, moment: MemoryMoment) -> int:
        """An attention's result that was offloaded, where the backward of its segment reads it."""
        if not moment.mode:
            return 0
        number = self._timeline.segments[moment.segments].layer
        held = self._layers[number]
        return held.host_result_bytes if held is not None and number < moment.layers else 0

    def _again(self, moment: MemoryMoment) -> int:
        found = 0
        for i in moment.again:
            if (held := self._layers[i]) is not None:
                kept = 0 if i in self._is_again and held.attention_again else held.result_bytes
                found += held.saved_bytes - kept
        return found

    def _workspace(self, moment: MemoryMoment) -> int:
        layers = (x for i in moment.working if (x := self._layers[i]) is not None)
        return max((x.workspace_bytes for x in layers), default=0)

    def total(self, index: int) -> int:
        moment = self._timeline.moments[index]
        of_terms = sum(self.scaled(moment.bytes)) + sum(self._before[moment.segments])
        return of_terms + sum(size for _, size in self._beside_terms(moment))

    def causes(self, index: int) -> Mapping[str, int]:
        moment = self._timeline.moments[index]
        found: dict[str, int] = {}
        before = self._before[moment.segments]
        for term, own, kept in zip(
            self._timeline.terms, self.scaled(moment.bytes), before, strict=True
        ):
            if own + kept:
                cause = self._name(term)
                found[cause] = found.get(cause, 0) + own + kept
        for cause, size in self._beside_terms(moment):
            found[cause] = found.get(cause, 0) + size
        return found

    def _beside_terms(self, moment: MemoryMoment) -> Sequence[tuple[str, int]]:
        return (
            (KEPT, self._masks_so_far[moment.masks]),
            (ROWS, self._rows),
            (KEPT_BY_ATTENTION, self._kept_so_far[moment.layers] + self._back(moment)),
            (AGAIN_FOR_ATTENTION, self._again(moment)),
            (WORKSPACE, self._workspace(moment)),
        )


def _takes_rows(mask: MemoryMask, layers: Sequence[Held | None]) -> bool:
    readers = [layers[i] for i in mask.readers]
    return any(x is None or x.own_queries for x in readers)


# --- making one ---------------------------------------------------------------------------------


def flat(
    sites: Sequence[AttentionSite], *, whole: int = 0, split: int = 0, world_size: int = 1
) -> MemoryTimeline:
    """Of a program of which only sums are known: all that is ever alive is alive at once.

    Parameters
    ----------
    whole, split
        Bytes of one rank outside attention, of ``world_size`` of them: those that do not shrink
        with more ranks or shorter sequences, and those that do.
    """
    regions: dict[int, list[int]] = {}
    for i, site in enumerate(sites):
        regions.setdefault(site.checkpoint, []).append(i)
    return MemoryTimeline(
        seq_len=max((site.kv_len for site in sites), default=1),
        terms=(
            MemoryTerm(cause="outside attention", tokens=0, is_split=False),
            MemoryTerm(cause="outside attention", tokens=1, is_split=True),
        ),
        moments=tuple(
            MemoryMoment(
                operator="", where="", bytes=(whole, split * world_size), layers=len(sites),
                masks=0, working=tuple(members), again=tuple(members) if region else (),
            )
            for region, members in (regions or {0: []}).items()
        ),
        layers=tuple(MemoryLayer(node=s.node, keeps_result=s.checkpoint > 0) for s in sites),
    )  # fmt: skip


def pruned(terms: Sequence[MemoryTerm], moments: Sequence[MemoryMoment]) -> list[int]:
    """Numbers of the moments that can be the largest, in order.

    One is never larger than another of the same segment and mode that has no less of any term that
    grows alike, as many layers and masks before it and the same layers at work.
    """
    groups: dict[tuple[int, str], list[int]] = {}
    for i, moment in enumerate(moments):
        groups.setdefault((moment.segments, moment.mode), []).append(i)
    return sorted(
        group[i] for group in groups.values() for i in _largest(terms, [moments[j] for j in group])
    )


def _largest(terms: Sequence[MemoryTerm], moments: Sequence[MemoryMoment]) -> list[int]:
    classes = sorted({_class(term) for term in terms})
    columns = [[i for i, term in enumerate(terms) if _class(term) == c] for c in classes]
    sizes = np.array([m.bytes for m in moments], np.int64).reshape(len(moments), len(terms))
    table = np.stack(
        [sizes[:, own].sum(1) for own in columns]
        + [np.array([getattr(m, name) for m in moments]) for name in ("layers", "masks")],
        axis=1,
    )
    # The largest first: what has been kept once is never below a later one.
    order = np.argsort(-table.astype(np.float64).sum(1), kind="stable")
    kept: list[int] = []
    for i in order:
        above = (table[kept] >= table[i]).all(1) if kept else np.zeros(0, bool)
        if not any(_covers(moments[kept[j]], moments[i]) for j in np.flatnonzero(above)):
            kept.append(int(i))
    return kept


def _class(term: MemoryTerm) -> tuple[int, bool, bool]:
    return term.tokens, term.is_split, term.cause == MESSAGES


def _covers(larger: MemoryMoment, smaller: MemoryMoment) -> bool:
    return _within(smaller.working, larger.working) and _within(smaller.again, larger.again)


def _within(some: Iterable[int], more: Iterable[int]) -> bool:
    return set(some) <= set(more)
