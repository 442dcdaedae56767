"""The plan: what ringfx will do to a model, as a value that is printed, saved and compared.

A plan is computed on fake tensors, without a process group and without an accelerator. Nothing in
it refers to a graph, so a plan made on a laptop can be read, diffed and checked anywhere.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import ConfigDict

from ringfx.errors import InvalidArgument
from ringfx.ir.memory_plan import MemoryPlan
from ringfx.ir.note import Note, NoteKind
from ringfx.ir.step_time import StepTime
from ringfx.ir.values import AttentionSite, Collective, Declined, InChunks, TokenAxis
from ringfx.units.format import format_bytes
from ringfx.validation.fields import (
    STRICT,
    Bytes,
    Count,
    Date,
    DeviceType,
    Kernels,
    Milliseconds,
    Name,
    Ranks,
    SomeText,
    Text,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["LOCAL", "REPLICATED", "SCHEMA_VERSION", "LayerPlan", "Plan", "joined"]

SCHEMA_VERSION = 3

REPLICATED = "replicated"
"""In place of a strategy: attention that every rank computes whole, with the local kernel."""
LOCAL = "local"
"""In place of a strategy: attention along an axis that is not split, of which each rank computes
its own part of the batch, without a message."""


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """What happens to one attention call, and what that is predicted to cost on one rank.

    Times are milliseconds of one step (forward, and backward where the layer trains):
    ``forward_ms + backward_ms == compute_ms + exposed_ms``. Communication that hides behind
    compute is counted in ``communication_ms`` and not in ``exposed_ms``.
    """

    site: AttentionSite
    strategy: Name
    reason: Text
    """Why this strategy, in words, with the numbers compared."""
    kernel: Kernels
    """The attention kernels that the plan counts on and the run takes, the fastest of the profile
    that admit the layer: ``cuda_cudnn``, or for each direction and for masked pieces another
    (``ringfx.ir.kernel_table.KernelChoice`` reads it)."""
    forward_ms: Milliseconds
    backward_ms: Milliseconds
    compute_ms: Milliseconds
    communication_ms: Milliseconds
    exposed_ms: Milliseconds
    saved_bytes: Bytes
    """Kept from forward to backward by this layer's attention, or from when it is run again."""
    result_bytes: Bytes = 0
    """Of these the output and its logsumexp: kept even where a checkpoint gives up the rest."""
    workspace_bytes: Bytes
    """Held only while this layer runs: communication buffers, accumulators, scores."""
    own_queries: bool = True
    """A rank computes its own queries only, and takes their rows of a mask or bias."""
    gloss: Text = ""
    """What the strategy is in the field's words: ``overlapped ring``."""
    head_groups: Count = 0
    """Groups of heads that the strategy is asked for, one after the other; 0: as it takes by
    itself."""
    recomputed: bool = False
    """Whether backward computes its layer again instead of keeping it."""
    attention_again: bool = False
    """Whether its attention is run again too, and its messages are sent again."""
    again_ms: Milliseconds = 0.0
    """What that takes."""
    offloaded: bool = False
    """Whether what its layer hands on, and its output, wait in the host's memory for backward."""
    host_bytes: Bytes = 0
    """What of them does."""
    host_result_bytes: Bytes = 0
    """Of it attention's output."""
    offload_ms: Milliseconds = 0.0
    """What sending it there and back takes."""
    axis: Text = ""
    """The axis of ``Plan.axes`` along which the ranks share its queries, or its batch where it is
    local; empty: they share neither."""

    @property
    def name(self) -> str:
        """Module path, such as ``model.layers.0.self_attn``."""
        return self.site.name

    @property
    def source(self) -> str:
        """``file:line`` of the user's call."""
        return self.site.source

    @property
    def found_by(self) -> str:
        """The detection rule that found it."""
        return self.site.found_by

    @property
    def mask(self) -> str:
        """The mask in words."""
        return self.site.mask_words

    @property
    def strategy_words(self) -> str:
        """The strategy as people read it: ``production (overlapped ring)``."""
        return f"{self.strategy} ({self.gloss})" if self.gloss else self.strategy

    @property
    def is_replicated(self) -> bool:
        """Whether every one of several ranks computes all of it; ``reason`` says why."""
        return self.strategy == REPLICATED

    @property
    def is_local(self) -> bool:
        """Whether each of several ranks attends by itself, to its own part of the batch."""
        return self.strategy == LOCAL

    @property
    def kept_bytes(self) -> int:
        """Of the saved bytes those that are there from forward to backward."""
        if self.attention_again:
            return 0
        again = self.site.checkpoint or self.recomputed
        return self.result_bytes - self.host_result_bytes if again else self.saved_bytes

    @property
    def total_ms(self) -> float:
        """Predicted wall time of one step, forward and backward."""
        return self.forward_ms + self.backward_ms


NO_MEMORY = MemoryPlan()
"""Nothing is known."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that ringfx decided for one model, one input shape and one world size."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    world_size: Ranks
    gpu_memory: Bytes | None
    """Budget of one rank in bytes; None: no budget was given."""
    device: DeviceType
    """Device type for which times are predicted: ``cpu``, ``cuda``."""
    profile: SomeText
    """Name of the profile whose constants made the predictions."""
    profile_origin: Text
    """Where that profile's numbers come from and how well they predict, in words."""
    layers: tuple[LayerPlan, ...]
    """One entry for each attention call, in program order."""
    declined: tuple[Declined, ...] = ()
    missed: tuple[Declined, ...] = ()
    """What looks like attention by an independent count and was neither found nor declined."""
    by_rows: tuple[Declined, ...] = ()
    """Attention that is computed as it is written, each rank with whole rows of its scores."""
    by_columns: tuple[Declined, ...] = ()
    """The same where queries are few: each rank has the columns of its own keys."""
    by_channels: tuple[Declined, ...] = ()
    """Attention of channels, whose scores ranks add up over their own tokens."""
    attentions: Count | None = None
    """How many attentions that count and detection see together; None: nobody counted."""
    axes: tuple[TokenAxis, ...] = ()
    collectives: tuple[Collective, ...] = ()
    chunks: tuple[InChunks, ...] = ()
    """Parts that run in chunks of tokens, in program order."""
    memory: MemoryPlan = NO_MEMORY
    notes: tuple[Note, ...] = ()
    outside_ms: Milliseconds = 0.0
    """Predicted time of the messages outside attention of one step, as if nothing hid them."""
    hidden_ms: Milliseconds = 0.0
    """Of it what attention's compute hides at least: messages of sharded states."""
    step: StepTime | None = None
    """What a step takes outside attention; None: the profile does not know."""
    optimizer: Text = ""
    """Whose state and time are counted; empty: nobody said."""
    recompute: Literal["auto", "none", "layers", "attention"] = "auto"
    """Which layers might be computed again; ``LayerPlan.recomputed`` says which are."""
    offload: Literal["auto", "none", "all"] = "auto"
    """Which of them might be offloaded; ``LayerPlan.offloaded`` says which are."""
    profile_date: Date = ""
    """When the profile was measured or put together, as 2026-11-23; empty: unknown."""
    schema: int = SCHEMA_VERSION

    @property
    def is_split(self) -> bool:
        """Whether the ranks share anything at all; with one rank there is nothing to share."""
        return self.world_size > 1 and bool(self.axes)

    @property
    def split_layers(self) -> tuple[LayerPlan, ...]:
        """The attentions of which each rank computes a part."""
        return tuple(x for x in self.layers if self.world_size > 1 and not x.is_replicated)

    @property
    def replicated_layers(self) -> tuple[LayerPlan, ...]:
        """The attentions that each of several ranks computes whole."""
        return tuple(x for x in self.layers if x.is_replicated)

    @property
    def has_tokens(self) -> bool:
        """Whether there is a sequence to split: attention over one, or an axis taken for one."""
        written = self.by_rows or self.by_columns or self.by_channels
        return bool(self.layers or written) or any(
            x.kind is NoteKind.NO_ATTENTION for x in self.notes
        )

    @property
    def unsplit_words(self) -> str:
        """That nothing is split, and why, where several ranks all run the whole model; or that
        little of it is."""
        if self.world_size == 1:
            return ""
        if self.is_split:
            return self._mostly_replicated_words
        causes = dict.fromkeys(x.reason.removeprefix("not split: ") for x in self.layers)
        why = f": {'; '.join(causes)}" if causes else ""
        return (
            f"NOTHING IS SPLIT: each of the {self.world_size} ranks runs the complete model, in "
            f"the time and memory of one rank{why}"
        )

    @property
    def _mostly_replicated_words(self) -> str:
        """Where more than half of what one rank alone would hold is on every rank."""
        attention = self.memory.of_kind("attention")
        alone = min(attention, sum(layer.kept_bytes for layer in self.replicated_layers))
        replicated = self.memory.of_kind("replicated") + alone
        whole = replicated + self.world_size * (self.memory.split_bytes + attention - alone)
        if 2 * replicated <= whole:
            return ""
        return (
            f"LITTLE IS SPLIT: {format_bytes(replicated)} of {format_bytes(whole)} of activations "
            f"at the peak are on each of the {self.world_size} ranks; what gathers them, and which "
            "attention is replicated, is said beside"
        )

    @property
    def found_words(self) -> str:
        """``attention: 11/12 found, 1 declined``: detection against the independent count."""
        found = len(self.layers)
        written = (*self.by_rows, *self.by_columns, *self.by_channels)
        explained = found + len(self.missed) + len(written)
        total = max(found if self.attentions is None else self.attentions, explained)
        declined = total - explained
        words = [f"attention: {found}/{total} found"]
        words += [f"{len(self.by_rows)} by rows of scores"] if self.by_rows else []
        words += [f"{len(self.by_columns)} by columns of scores"] if self.by_columns else []
        words += [f"{len(self.by_channels)} of channels"] if self.by_channels else []
        words += [f"{declined} declined"] if declined else []
        words += [f"{len(self.missed)} MISSED"] if self.missed else []
        whole = len(self.replicated_layers)
        words += [f"{whole} replicated (every rank computes all of it)"] if whole else []
        return ", ".join(words)

    @property
    def total_ms(self) -> float:
        """Predicted wall time of all attention of one step on one rank."""
        return sum(layer.total_ms for layer in self.layers)

    @property
    def step_ms(self) -> float | None:
        """Predicted wall time of a whole step on one rank; None: the profile does not know what
        runs outside attention."""
        if self.step is None:
            return None
        messages_ms = max(0.0, self.outside_ms - self.hidden_ms)
        again_ms = self.again_ms + self.offload_ms
        return self.step.total_ms + self.total_ms + again_ms + messages_ms

    @property
    def again_ms(self) -> float:
        """What computing layers again takes in a step."""
        return sum(layer.again_ms for layer in self.layers)

    @property
    def offload_ms(self) -> float:
        """What sending values to the host's memory and back takes in a step."""
        return sum(layer.offload_ms for layer in self.layers)

    @property
    def num_collectives(self) -> int:
        """Messages of one step outside attention, forward and backward."""
        return len(self.collectives)

    @property
    def collective_bytes(self) -> int:
        """What those messages bring to one rank."""
        return sum(move.bytes_moved for move in self.collectives)

    @property
    def saved_bytes(self) -> int:
        """What attention keeps from forward to backward."""
        return sum(layer.kept_bytes for layer in self.layers)

    @property
    def workspace_bytes(self) -> int:
        """What attention holds for a while: buffers, and what is computed again for it."""
        regions: dict[int, int] = {}
        for layer in self.layers:
            region = layer.site.checkpoint
            again = layer.saved_bytes - layer.kept_bytes
            regions[region] = regions.get(region, 0) + again if region else 0
        held = (
            layer.workspace_bytes
            + (regions[layer.site.checkpoint] or layer.saved_bytes - layer.kept_bytes)
            for layer in self.layers
        )
        return max(held, default=0)

    @property
    def trains(self) -> bool:
        """Whether any layer has a backward pass; without layers, whether the program has one."""
        if self.layers:
            return any(layer.site.trains for layer in self.layers)
        return any("gradient" in part.cause for part in self.memory.parts) or any(
            part.backward_ms for part in (self.step.parts if self.step else ())
        )

    def layer(self, name: str) -> LayerPlan:
        """The layer of that module path; raises InvalidArgument listing what there is."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        known = ", ".join(layer.name for layer in self.layers[:8])
        raise InvalidArgument(
            f"the plan has no attention named {name!r}. Do: name one of its {len(self.layers)}: "
            + known
            + (", ..." if len(self.layers) > 8 else ".")
        )

    def digest(self) -> str:
        """Hash of all that ranks must agree on; equal digests run the same communication.

        Times, memory, notes, file names and the profile are left out: they may differ between
        machines without changing a single message.
        """
        agreed = {
            "schema": self.schema,
            "world_size": self.world_size,
            "layers": [_agreed_layer(layer) for layer in self.layers],
            "axes": [dataclasses.asdict(axis) for axis in self.axes],
            "chunks": [[x.tokens, x.count, x.deferred] for x in self.chunks],
            "collectives": [
                [move.node, move.name, move.kind, move.bytes_moved] for move in self.collectives
            ],
        }
        text = json.dumps(agreed, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """The whole plan as text; ``Plan.from_json`` gives an equal value back."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @staticmethod
    def from_json(text: str, name: str = "plan") -> Plan:
        """Read a plan written by ``to_json``; ``name`` of its file stands in errors.

        Raises
        ------
        InvalidArgument
            The text is not a plan, was written with another schema version, or a field is missing,
            unknown or has a value that cannot be.
        """
        from ringfx.ir.plan_file import read_plan

        return read_plan(text, name)

    def __rich__(self) -> RenderableType:
        from ringfx.ir import plan_text

        return plan_text.render(self)

    def __str__(self) -> str:
        from ringfx.ir import plan_text

        return plan_text.to_text(self)


def joined(plans: Sequence[Plan]) -> Plan:
    """One plan of a model that runs as several graphs (it has graph breaks)."""
    last = plans[-1]
    if len(plans) == 1:
        return last
    return dataclasses.replace(
        last,
        layers=tuple(x for p in plans for x in p.layers),
        declined=tuple(x for p in plans for x in p.declined),
        missed=tuple(x for p in plans for x in p.missed),
        by_rows=tuple(x for p in plans for x in p.by_rows),
        by_columns=tuple(x for p in plans for x in p.by_columns),
        by_channels=tuple(x for p in plans for x in p.by_channels),
        attentions=sum(len(p.layers) if p.attentions is None else p.attentions for p in plans),
        axes=max((p.axes for p in plans), key=len),
        collectives=tuple(x for p in plans for x in p.collectives),
        chunks=tuple(x for p in plans for x in p.chunks),
        outside_ms=sum(p.outside_ms for p in plans),
        hidden_ms=sum(p.hidden_ms for p in plans),
        memory=_joined_memory([p.memory for p in plans]),
        step=_joined_step([p.step for p in plans]),
        notes=tuple(dict.fromkeys(x for p in plans for x in p.notes)),
    )


KEPT = ("parameter", "optimizer state", "activations saved for backward", "saved by attention")
"""Beginnings of causes that stay from one program's end to its backward, or always."""


def _joined_memory(programs: Sequence[MemoryPlan]) -> MemoryPlan:
    """The program with the largest peak, with what the others keep meanwhile."""
    largest = max(programs, key=lambda m: m.peak_bytes)
    parts = {part.cause: part for part in largest.parts}
    for other in programs:
        for part in other.parts if other is not largest else ():
            if part.cause.startswith(KEPT):
                held = parts.get(part.cause, dataclasses.replace(part, bytes=0))
                parts[part.cause] = dataclasses.replace(held, bytes=held.bytes + part.bytes)
    unknown = dict.fromkeys((*(x for m in programs for x in m.unknown), SEVERAL_PROGRAMS))
    return MemoryPlan(
        parts=tuple(parts.values()), by_block=largest.by_block, unknown=tuple(unknown)
    )


def _joined_step(programs: Sequence[StepTime | None]) -> StepTime | None:
    """One after the other; None: the time of one of them is not known."""
    known = [x for x in programs if x is not None]
    if len(known) < len(programs):
        return None
    return dataclasses.replace(
        known[-1],
        parts=tuple(part for x in known for part in x.parts),
        tokens=max(x.tokens for x in known),
        attention_gflops=sum(x.attention_gflops for x in known),
        peak_gflops=next((x.peak_gflops for x in known if x.peak_gflops), None),
        by_block=tuple(row for x in known for row in x.by_block),
    )


SEVERAL_PROGRAMS = (
    "tensors that Python holds between programs (after graph breaks); parameters that several "
    "programs use count once for each"
)


def _agreed_layer(layer: LayerPlan) -> list[Any]:
    site = layer.site
    sizes = [site.batch, site.heads, site.kv_heads, site.head_dim, site.v_head_dim]
    return [
        site.node,
        site.name,
        layer.strategy,
        layer.head_groups,
        layer.recomputed,
        layer.attention_again,
        layer.offloaded,
        layer.axis,
        site.spec.to_json(),
        site.dtype,
        sizes,
    ]
