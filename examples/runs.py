"""Runs examples.train in fresh processes and gathers what its ranks reported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from examples.train import Trained, trained
from ringfx.comm.local_ranks import LocalRanks
from ringfx.errors import CommunicationError

__all__ = ["Run", "RunError", "Setting", "execute"]

ROOT = Path(__file__).parent.parent


class RunError(RuntimeError):
    """A rank of a training run failed; the text holds its traceback."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to run the training script."""

    name: str
    ranks: int
    threads: int
    """Threads of each rank."""
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """What the ranks of one run reported."""

    setting: Setting
    losses: tuple[tuple[float, ...], ...]
    """By rank, then by step."""
    seconds: tuple[float, ...]
    """Of each step: the slowest rank's."""
    extra_bytes: tuple[int | None, ...]
    """By rank: peak memory of one step beyond what was there before it."""
    gradients: tuple[dict[str, torch.Tensor | None], ...]
    """By rank: each parameter's gradient after the first step."""
    plan: str

    @property
    def worst_extra_bytes(self) -> int | None:
        measured = [value for value in self.extra_bytes if value is not None]
        return max(measured) if len(measured) == len(self.extra_bytes) else None


def execute(
    setting: Setting, folder: Path, on_event: Callable[[dict[str, Any]], None] = lambda _: None
) -> Run:
    """Runs the setting in fresh processes; ``on_event`` sees rank 0's reports as they come.

    What the ranks print is in a file of ``folder``.
    """

    def heard(rank: int, event: dict[str, Any]) -> None:
        if rank == 0:
            on_event(event)

    log = folder / f"{setting.name.replace(' ', '-')}.log"
    with LocalRanks(setting.ranks, threads=setting.threads, output=log) as ranks:
        try:
            found: list[Trained] = ranks.run(trained, setting.arguments, on_report=heard)
        except CommunicationError as failure:
            raise RunError(f"{setting.name}: {failure}") from failure
    return Run(
        setting=setting,
        losses=tuple(x.losses for x in found),
        seconds=tuple(max(times) for times in zip(*(x.seconds for x in found), strict=True)),
        extra_bytes=tuple(x.extra_bytes for x in found),
        gradients=tuple(x.gradients for x in found),
        plan=found[0].plan,
    )
