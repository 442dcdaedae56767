"""Run a measurement on several ranks: started here on one machine, or found under torchrun."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import torch.distributed as dist

from ringfx.comm.local_ranks import LocalRanks
from ringfx.comm.process_group import Ranks
from ringfx.errors import CommunicationError

__all__ = ["Progress", "on_ranks"]

R = TypeVar("R")

Progress: TypeAlias = Callable[[str, int, int], None]
"""(what is measured, how many are done, how many there are)."""

Work: TypeAlias = Callable[[Ranks, str, Progress, Any], R]
"""(ranks, device, progress, task) -> what rank 0 found; a function at the top of a module."""

TIMEOUT = datetime.timedelta(minutes=10)


def on_ranks(
    work: Work[R], task: Any, *, device: str, num_ranks: int, progress: Progress
) -> R | None:
    """What rank 0 found; None on the other ranks of a torchrun job.

    Raises
    ------
    CommunicationError
        A rank failed or ended; the text holds its traceback.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return _under_torchrun(work, task, device, progress)
    threads = max(1, (os.cpu_count() or 1) // num_ranks)
    timeout_s = TIMEOUT.total_seconds()
    with LocalRanks(
        num_ranks, device=device, threads=threads, collective_timeout_s=timeout_s
    ) as ranks:
        try:
            found: list[R] = ranks.run(
                _measured, work, device, task, on_report=lambda _, step: progress(*step)
            )
        except CommunicationError as error:
            raise CommunicationError(
                f"measurement: {error}\nDo: run again with fewer --ranks."
            ) from error
    return found[0]


def _measured(
    work: Work[R], device: str, task: Any, *, report: Callable[[tuple[str, int, int]], None]
) -> R:
    first = dist.get_rank() == 0
    return work(_ranks(), device, (lambda *step: report(step)) if first else _silent, task)


def _under_torchrun(work: Work[R], task: Any, device: str, progress: Progress) -> R | None:
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        watched = dist.get_rank() == 0
        found = work(_ranks(), device, progress if watched else _silent, task)
        return found if watched else None
    finally:
        dist.destroy_process_group()


def _silent(what: str, done: int, total: int) -> None:
    """Progress of a rank that nobody watches."""


def _ranks() -> Ranks:
    world = dist.group.WORLD
    assert world is not None, "a process group was initialised"
    return Ranks(dist.get_rank(), dist.get_world_size(), world, "measurement")
