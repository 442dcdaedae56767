"""How a value outside the programs is split, and how the ranks agree to touch it together."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

import torch

from ringfx.comm.process_group import Ranks
from ringfx.comm.rendezvous import Absent, meet
from ringfx.errors import AgreementError
from ringfx.failures.channel import settled
from ringfx.ir.values import Arrival

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
        """Of a value that lies so."""
        return SplitSpec(**_of_arrival(arrival), **rest)

    def arrival(self) -> Arrival:
        """How it is split, as a program is told that takes it."""
        return Arrival(**_of_arrival(self))

    def with_arrival(self, arrival: Arrival, shape: tuple[int, ...], number: str) -> SplitSpec:
        """What is computed from it and split so."""
        return replace(self, **_of_arrival(arrival), shape=shape, number=number)

    def tokens(self) -> tuple[Any, ...]:
        """What values that are split alike agree in, as far as broadcasting goes."""
        from_the_end = len(self.shape) - self.dim
        return (
            self.layout, self.offset, self.length, from_the_end, self.outer, self.inner, self.group
        )  # fmt: skip

    def is_on_every_rank(self) -> bool:
        """Whether each rank has a token of it."""
        size, end = self.layout.chunk_length, self.offset + self.length
        starts = map(self.layout.chunk_starts, range(self.layout.world_size))
        return all(any(s < end and s + size > self.offset for s in chunks) for chunks in starts)

    def order(self, device: torch.device) -> torch.Tensor:
        return self.layout.order(device)[self.offset : self.offset + self.length]


def _of_arrival(value: Arrival) -> dict[str, Any]:
    return {f.name: getattr(value, f.name) for f in fields(Arrival)}


class GatherObserver(Protocol):
    """Is given a value that is gathered and its size in bytes."""

    @property
    def model_runs(self) -> bool:
        """Whether the model runs: every rank then runs the same calls."""

    def __call__(self, spec: SplitSpec, num_bytes: int) -> None: ...


def rendezvous_before_gather(spec: SplitSpec, part: str = "") -> None:
    """All ranks say that they touch this output before any of them starts to gather.

    Raises
    ------
    AgreementError
        When some ranks do not come: ``if rank == 0: print(logits)`` would hang otherwise.
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
                "`if rank == 0`), or pass outputs='local' to get each rank's own part."
            )
        ) from absent
