"""The rows of a profile: what one kernel, product, link, strategy was measured or said to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from ringfx.validation.fields import FloatDtype, Level, Name, Rate, SomeText, UnitCost

__all__ = [
    "Capability", "Direction", "KernelRow", "Kind", "LinkRow", "MemoryRow", "Operation",
    "OverheadRow", "ProductRow", "Scope",
]  # fmt: skip

Direction = Literal["forward", "backward"]
Operation = Literal["send_recv", "all_gather", "reduce_scatter", "all_to_all", "all_reduce"]
Scope = Literal["node", "network"]
Kind = Literal["measured", "published", "assumed", "observed"]
"""observed: fitted to whole strategies of other code; only for one rank, never found by itself."""


Capability: TypeAlias = Annotated[str, Field(pattern=r"^([1-9][0-9]?\.[0-9])?$")]
PeakBytes: TypeAlias = Annotated[float, Field(ge=0, le=1e24, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True)
class KernelRow:
    """Time of calls of an attention kernel, linear in its work with no negative term.

    See ``ringfx.cost_model.prediction.terms.kernel_seconds``.
    """

    kernel: Name
    dtype: FloatDtype
    direction: Direction
    call_us: UnitCost
    gflops: Rate
    origin: SomeText
    ns_per_pair: UnitCost = 0.0
    """What a (query, key) pair costs whatever the head dims: its part of the softmax."""
    masked_ns_per_pair: UnitCost = 0.0
    """What a pair costs more where the kernel reads a mask."""


@dataclass(frozen=True, kw_only=True)
class ProductRow:
    """Time of a matrix product: call_us / 1e6 + flops / (gflops * 1e9) + bytes * ns_per_byte / 1e9.

    Backward: of the two products for the gradients of both factors, on average.
    """

    dtype: FloatDtype
    direction: Direction
    call_us: UnitCost
    gflops: Rate
    """That large products reach."""
    origin: SomeText
    ns_per_byte: UnitCost = 0.0
    """Of factors and result."""
    peak_gflops: Rate | None = None
    """The device's own peak in this type, that shares of it are told of; None: ``gflops``."""


@dataclass(frozen=True, kw_only=True)
class LinkRow:
    """Time of one collective: latency_us / 1e6 for each step, bytes / (gbytes_per_s * 1e9).

    Bytes are those that one rank receives. ``scope`` says whether the ranks share a node.
    """

    operation: Operation
    scope: Scope
    latency_us: UnitCost
    gbytes_per_s: Rate
    origin: SomeText


@dataclass(frozen=True, kw_only=True)
class OverheadRow:
    """What one layer costs however small it is: launches, bookkeeping, the scheduler's ticks.

    ``strategy`` is ``LOCAL`` for one rank.
    """

    strategy: Name
    direction: Direction
    layer_us: UnitCost
    origin: SomeText


@dataclass(frozen=True, kw_only=True)
class MemoryRow:
    """Peak bytes of one whole strategy as it was observed.

    bytes = base_bytes + tensors * (bytes of q) + scores * (bytes of b h n^2 scores)
    """

    strategy: Name
    base_bytes: PeakBytes
    tensors: Level
    scores: Level
    origin: SomeText
