"""What a plan says of memory: the peak's parts, and the timeline that it is taken from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from ringfx.validation.fields import (
    Bytes,
    Count,
    Milliseconds,
    Power,
    SomeText,
    Text,
    Tokens,
)

__all__ = [
    "MARGIN", "Kind", "MemoryLayer", "MemoryMask", "MemoryMoment", "MemoryPart", "MemoryPlan",
    "MemorySegment", "MemoryTerm", "MemoryTimeline",
]  # fmt: skip

MARGIN = 0.03
"""Of a budget, what predictions of memory may miss (benchmarks/results/budgets.json)."""


Kind: TypeAlias = Literal["whole", "replicated", "split", "attention"]


@dataclass(frozen=True, kw_only=True)
class MemoryPart:
    """One cause of memory use on one rank, at the moment of the peak."""

    cause: SomeText
    bytes: Bytes
    kind: Kind
    """whole: the same with any number of ranks; replicated: activations of which every rank has
    all; split: falls with the ranks; attention: of the layers."""
    detail: Text = ""


@dataclass(frozen=True, kw_only=True)
class MemoryTerm:
    """Bytes of one cause that grow alike."""

    cause: SomeText
    tokens: Power
    """The power of the sequence's length that they grow with."""
    is_split: bool
    """Whether each rank holds its share of them, or all."""


@dataclass(frozen=True, kw_only=True)
class MemoryMoment:
    """A point of the program at which the peak may lie: of this length and number of ranks, or of
    others."""

    operator: Text
    """What runs there."""
    where: Text
    """Its module path."""
    bytes: tuple[Bytes, ...]
    """Of each term of the timeline, of all ranks together."""
    layers: Count
    """Attention layers that keep tensors there: so many of the first."""
    masks: Count
    """Whole masks that are kept there: so many of the first."""
    working: tuple[Count, ...]
    """Layers whose workspace may be held there, by number."""
    again: tuple[Count, ...]
    """Layers whose inputs are there again for a checkpoint, by number."""
    segments: Count = 0
    """Segments that lie wholly before it: what they keep comes on top."""
    mode: Literal["", "kept", "again"] = ""
    """Within the next segment: it exists where that one is kept, or is computed again."""


@dataclass(frozen=True, kw_only=True)
class MemoryLayer:
    """An attention layer as the timeline counts it."""

    node: SomeText
    """Of its site."""
    keeps_result: bool
    """Whether it keeps its result alone: its inputs are computed again."""


@dataclass(frozen=True, kw_only=True)
class MemorySegment:
    """A stretch of the program, a layer, whose values are kept for backward or computed again."""

    layer: Count
    """Number of its attention, which is run once either way."""
    kept: tuple[Bytes, ...]
    """Of each term, what it keeps outside attention."""
    kept_again: tuple[Bytes, ...]
    """The same where it is computed again."""
    again_ms: Milliseconds
    """What computing it again takes, of all ranks together."""
    offloaded: tuple[Bytes, ...] = ()
    """Of ``kept_again`` what may wait in the host's memory: what only the next segment reads."""


@dataclass(frozen=True, kw_only=True)
class MemoryMask:
    """A whole mask or bias of which each rank takes its queries' rows, where it computes those."""

    bytes: Bytes
    tokens: Power
    """The power of the sequence's length that they grow with."""
    readers: tuple[Count, ...]
    """Layers that read it, by number."""
    is_kept: bool
    """Whether it is kept for backward where no rows are taken."""


@dataclass(frozen=True, kw_only=True)
class MemoryTimeline:
    """What is alive when, as far as any peak depends on it: ``ringfx/ir/memory_timeline.py``."""

    seq_len: Tokens
    """The longest sequence of its attentions, for which the bytes are counted."""
    terms: tuple[MemoryTerm, ...]
    moments: tuple[MemoryMoment, ...]
    layers: tuple[MemoryLayer, ...]
    masks: tuple[MemoryMask, ...] = ()
    segments: tuple[MemorySegment, ...] = ()
    """In program order; empty: nothing is computed again but what the user checkpoints."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What the peak of one rank's memory is made of, as far as it is known."""

    parts: tuple[MemoryPart, ...] = ()
    by_block: tuple[tuple[Text, Bytes], ...] = ()
    """Activations, their gradients and attention at the peak: bytes by block of the model."""
    over_program: tuple[Bytes, ...] = ()
    """The largest sum in each of some equal stretches of the program, in its order: of a step that
    trains, while the backward passes the stretch. The largest of all is the peak."""
    unknown: tuple[Text, ...] = ()
    """Causes that the prediction leaves out, in words; empty when it is complete."""
    timeline: MemoryTimeline | None = None
    """What the peak is taken from, again for another length, number of ranks or strategies."""

    @property
    def peak_bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    @property
    def whole_bytes(self) -> int:
        """Outside attention: what stays the same with more ranks."""
        return self.of_kind("whole") + self.of_kind("replicated")

    @property
    def split_bytes(self) -> int:
        """Outside attention: what falls with more ranks."""
        return self.of_kind("split")

    def of_kind(self, kind: Kind) -> int:
        """Bytes of the parts of one kind."""
        return sum(part.bytes for part in self.parts if part.kind == kind)
