"""How a value outside the programs is sharded, and the rendezvous of ranks before a gather."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

import torch

from ringfx.comm.process_group import Ranks
from ringfx.comm.rendezvous import Absent, meet
from ringfx.errors import AgreementError
from ringfx.failures.channel import settled
from ringfx.ir.values import Arrival
from ringfx.units.argument import Argument

__all__ = ["GatherObserver", "SplitSpec", "rendezvous_before_gather"]


@dataclass(frozen=True, kw_only=True)
class SplitSpec(Arrival):
    """How one value outside the programs is split, and which rank looks at it."""

    name: str = field(compare=False)
    shape: tuple[int, ...]
    rank: int
    group: str
    number: str = field(default="", compare=False)
    """Tells outputs apart, and what is computed from them, in the same words on every rank."""

    def index(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """(element that each local token holds, whether it holds one)."""
        own = self.layout.positions(self.rank, device) - self.offset
        return own.clamp(0, self.length - 1), (own >= 0) & (own < self.length)

    @staticmethod
    def of(arrival: Arrival, **rest: Any) -> SplitSpec:
        """Of a value with this placement."""
        return SplitSpec(**_of_arrival(arrival), **rest)

    def arrival(self) -> Arrival:
        """Its placement, for a program that takes it as an input."""
        return Arrival(**_of_arrival(self))

    def with_arrival(self, arrival: Arrival, shape: tuple[int, ...], number: str) -> SplitSpec:
        """The spec of a result computed from it, with this placement."""
        return replace(self, **_of_arrival(arrival), shape=shape, number=number)

    def tokens(self) -> tuple[Any, ...]:
        """Equal for values that are sharded alike, up to broadcasting."""
        from_the_end = len(self.shape) - self.dim
        return (
            self.layout, self.offset, self.length, from_the_end, self.outer, self.inner, self.group
        )  # fmt: skip

    def is_on_every_rank(self) -> bool:
        """Whether every rank has at least one of its tokens."""
        size, end = self.layout.chunk_length, self.offset + self.length
        starts = map(self.layout.chunk_starts, range(self.layout.world_size))
        return all(any(s < end and s + size > self.offset for s in chunks) for chunks in starts)

    def order(self, device: torch.device) -> torch.Tensor:
        return self.layout.order(device)[self.offset : self.offset + self.length]


def _of_arrival(value: Arrival) -> dict[str, Any]:
    return {f.name: getattr(value, f.name) for f in fields(Arrival)}


class GatherObserver(Protocol):
    """Called with every value that is gathered and its size in bytes."""

    @property
    def model_runs(self) -> bool:
        """Whether the model is running: every rank then makes the same calls."""

    def __call__(self, spec: SplitSpec, num_bytes: int) -> None: ...


def rendezvous_before_gather(spec: SplitSpec, part: str = "") -> None:
    """Wait until all ranks use this output; only then may a gather start.

    Raises
    ------
    AgreementError
        If some ranks do not arrive: without it ``if rank == 0: print(logits)`` would hang.
    """
    ranks = Ranks.named(spec.group, spec.name)
    what = f"a use of {spec.name} {spec.shape}, number {spec.number}{part}"
    try:
        meet(ranks, what)
    except Absent as absent:
        limit = f"{ranks.channel.timeout.total_seconds():.0f} s, the group's timeout"
        raise settled(
            AgreementError(
                f"{spec.name} {spec.shape} is split over {spec.layout.world_size} ranks and was "
                f"used on rank {spec.rank}, but ranks {absent.ranks} did not use it within "
                f"{limit}; gathering needs all ranks. Do: use it on every rank (compute before "
                f"`if rank == 0`), or pass {Argument('outputs', 'local')} to get each rank's own "
                "part."
            )
        ) from absent
