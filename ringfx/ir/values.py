"""The values that passes hand to each other: frozen, comparable, printable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

import torch

from ringfx.ir.attention_spec import AttentionSpec
from ringfx.ir.layout import Layout, LayoutKind
from ringfx.validation.fields import (
    Bytes,
    Count,
    DeviceType,
    FloatDtype,
    Share,
    Size,
    SomeText,
    Text,
    Tokens,
)

__all__ = [
    "Arrival",
    "AttentionSite",
    "Captured",
    "Collective",
    "CommKind",
    "Declined",
    "InChunks",
    "TokenAxis",
]


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """How an input that an earlier program left split is split: ``dim`` is [outer, tokens, inner].

    Element i of its tokens is at position ``offset + i`` of the layout.
    """

    layout: Layout
    offset: int
    length: int
    dim: int
    outer: int
    inner: int


@dataclass(frozen=True, eq=False, kw_only=True)
class Captured:
    """The model's program as a flat, functional, pre-dispatch ATen graph.

    Every node carries ``meta["val"]`` (a fake tensor of the *global* shape), its module path in
    ``meta["ringfx_path"]`` and its source line in ``meta["ringfx_source"]`` (``file:line``).
    """

    graph_module: torch.fx.GraphModule
    input_names: tuple[str, ...]
    """One readable name for each placeholder: a parameter's path or an argument's name."""
    is_parameter: tuple[bool, ...]
    needs_grad: tuple[bool, ...]
    writes: tuple[int, ...] = ()
    """Inputs (buffers, mostly) that the user's program writes: their new values are the program's
    last results, and are copied into the user's tensors after each run."""
    returned: Mapping[int, int] = field(default_factory=dict)
    """Results that are a written input itself: index of the result -> index of the input."""
    graph_break: str | None = None
    """The user frame that broke the graph after this program, if one did."""
    buffers: Mapping[int, torch.Tensor] = field(default_factory=dict)
    """Values of the inputs that a module holds and this program does not write."""
    unvalued: frozenset[int] = frozenset()
    """Inputs that a module holds without values: planned offline, of a model on ``meta``."""
    held: frozenset[int] = frozenset()
    """Inputs that modules hold: parameters and buffers."""
    uncompiled_caller: str | None = None
    """The user frame that calls this program and that Dynamo could not compile, if there is one."""


@dataclass(frozen=True, kw_only=True)
class AttentionSite:
    """One attention of the program, in canonical form."""

    node: SomeText
    """Name of the canonical node in the captured graph."""
    name: Text
    """Module path, such as ``model.layers.0.self_attn``."""
    source: Text
    """``file:line`` of the user's call."""
    found_by: SomeText
    """The detection rule, such as ``sdpa``."""
    spec: AttentionSpec
    mask_words: Text
    """The mask as a person says it: ``causal, window 4096, packed documents``."""
    density: Share
    """Share of (query, key) pairs that are kept, 0 to 1; 1 where it depends on the data."""
    balanced: bool
    """Whether every query row keeps about as many keys as any other (false for causal)."""
    batch: Size
    heads: Size
    kv_heads: Size
    head_dim: Size
    v_head_dim: Size
    dtype: FloatDtype
    """As torch names it without the prefix: ``float32``, ``bfloat16``."""
    device: DeviceType
    """Device type: ``cpu``, ``cuda``."""
    trains: bool
    """Whether a backward pass goes through it."""
    matrix_bytes: Bytes = 0
    """Bytes of the masks and biases with an entry for each query and key that it is given."""
    taken_bytes: Bytes = 0
    """Of these, bytes of those that it reads at its queries' own rows: a rank takes its own."""
    row_bytes: Bytes = 0
    """Bytes of what it computes and reads at its queries' own rows, which is split with them."""
    checkpoint: Count = 0
    """The checkpointed region that it lies in and is run again with in backward; 0: none."""
    is_local: bool = False
    """Whether ranks share its batch or its heads, and not its tokens: each attends by itself."""

    @property
    def q_len(self) -> int:
        return self.spec.q_len

    @property
    def kv_len(self) -> int:
        return self.spec.kv_len


@dataclass(frozen=True, kw_only=True)
class Declined:
    """A region that looks like attention and is not parallelized, with the reason."""

    node: Text
    name: Text
    source: Text
    reason: Text


@dataclass(frozen=True, kw_only=True)
class TokenAxis:
    """An axis of tokens that is split over the ranks, and how."""

    axis: SomeText
    length: Tokens
    layout: LayoutKind
    local_length: Tokens


@dataclass(frozen=True, kw_only=True)
class InChunks:
    """A part of the model that runs in chunks of a rank's tokens."""

    name: Text
    """Module path."""
    source: Text
    """``file:line``."""
    tokens: Tokens
    """Of one chunk."""
    count: Tokens
    """Chunks of one rank."""
    bytes: Bytes
    """Of what is wide in one chunk."""
    gradients: Literal["with it", "again", "none"]
    """Whether its gradients are computed with it (a loss), or after it ran again in backward."""
    deferred: Count = 0
    """Wide values of it that the model returns: they are computed when they are touched."""


class CommKind(StrEnum):
    """What ranks do together outside attention."""

    ALL_GATHER = "all_gather"
    """Every rank gets all tokens."""
    ALL_GATHER_GRADIENT = "all_gather_gradient"
    """In backward, of a replicated value whose users have a rank's tokens each."""
    ALL_GATHER_STATES = "all_gather_states"
    """Of parameters of which each rank holds its rows."""
    ALL_REDUCE = "all_reduce"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_TO_ALL = "all_to_all"
    """From tokens that are sharded along one axis to another."""
    HALO_EXCHANGE = "halo_exchange"
    """A few tokens, between ranks that have neighbouring runs."""

    @property
    def gathers(self) -> bool:
        """Whether each rank gets all of a sharded value."""
        return self in (CommKind.ALL_GATHER, CommKind.ALL_GATHER_GRADIENT)

    @classmethod
    def _missing_(cls, value: object) -> CommKind | None:
        """Plans that were saved before have other names."""
        old = {
            "gather": cls.ALL_GATHER, "gather_gradient": cls.ALL_GATHER_GRADIENT,
            "exchange": cls.ALL_TO_ALL, "borders": cls.HALO_EXCHANGE,
        }  # fmt: skip
        return old.get(str(value))


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective outside attention: a value changes its placement, or is summed."""

    node: Text
    name: Text
    source: Text
    kind: CommKind
    bytes_moved: Bytes
    """Bytes that one rank has when it is done."""
    reason: Text
    in_backward: bool = False
    ranks: Count = 0
    """Over so many ranks; 0: those of the sequence."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Sites:
    """What detection found."""

    found: tuple[AttentionSite, ...]
    declined: tuple[Declined, ...] = ()
    buffers: tuple[int, ...] = ()
    """Inputs of the program whose present values the masks count on."""
    unvalued: tuple[int, ...] = ()
    """Inputs that masks read and a module holds without values: they count as given."""
    inputs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """For each site's node, the graph nodes whose tensors its tile functions read."""
