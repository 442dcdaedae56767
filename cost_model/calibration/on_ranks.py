"""Run a measurement on several ranks: started here on one machine, or found under torchrun."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
import torch.distributed as dist

from ringfx.comm.process_group import Ranks
from ringfx.errors import CommunicationError

__all__ = ["Progress", "on_ranks"]

R = TypeVar("R")

Progress: TypeAlias = Callable[[str, int, int], None]
"""(what is measured, how many are done, how many there are)."""

Work: TypeAlias = Callable[[Ranks, str, Progress, Any], R]
"""(ranks, device, progress, task) -> what rank 0 found; a function at the top of a module."""

TIMEOUT = datetime.timedelta(minutes=10)


@dataclass(frozen=True)
class _Found:
    """Wraps a result, so that it is told from progress and errors."""

    value: Any


def on_ranks(
    work: Work[R], task: Any, *, device: str, num_ranks: int, progress: Progress
) -> R | None:
    """What rank 0 found; None on the other ranks of a torchrun job.

    Raises
    ------
    CommunicationError
        Rank 0 failed or ended; the text holds its last words.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return _under_torchrun(work, task, device, progress)
    return _on_this_machine(work, task, device, num_ranks, progress)


def _under_torchrun(work: Work[R], task: Any, device: str, progress: Progress) -> R | None:
    dist.init_process_group(_backend(device), timeout=TIMEOUT)
    try:
        watched = dist.get_rank() == 0
        found = work(_ranks(), device, progress if watched else _silent, task)
        return found if watched else None
    finally:
        dist.destroy_process_group()


def _silent(what: str, done: int, total: int) -> None:
    """Progress of a rank that nobody watches."""


def _backend(device: str) -> str:
    return "nccl" if device == "cuda" else "gloo"


def _ranks() -> Ranks:
    world = dist.group.WORLD
    assert world is not None, "a process group was initialised"
    return Ranks(dist.get_rank(), dist.get_world_size(), world, "measurement")


def _on_this_machine(
    work: Work[R], task: Any, device: str, num_ranks: int, progress: Progress
) -> R:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(num_ranks)]
        processes = [
            context.Process(
                target=_rank,
                args=(rank, num_ranks, folder, device, work, task, sender),
                daemon=True,
            )
            for rank, (_, sender) in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        for _, sender in pipes:
            sender.close()
        try:
            found: R = _watched(pipes[0][0], progress)
            return found
        finally:
            for process in processes:
                process.join(timeout=5)
                process.kill()


def _watched(receiver: Connection, progress: Progress) -> Any:
    """What rank 0 found, while showing how far it is."""
    while True:
        try:
            message = receiver.recv()
        except EOFError as error:
            raise CommunicationError(
                "measurement: rank 0 ended without a result. Do: run again with fewer --ranks, and"
                " read what the ranks printed above."
            ) from error
        if isinstance(message, _Found):
            return message.value
        if isinstance(message, str):
            raise CommunicationError(f"measurement: rank 0 failed: {message}")
        progress(*message)


def _rank(
    rank: int,
    num_ranks: int,
    folder: str,
    device: str,
    work: Work[Any],
    task: Any,
    sender: Connection,
) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_ranks))
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        _backend(device),
        init_method=f"file://{Path(folder) / 'store'}",
        rank=rank,
        world_size=num_ranks,
        timeout=TIMEOUT,
    )
    try:
        sender.send(_Found(work(_ranks(), device, lambda *step: sender.send(step), task)))
    except Exception as error:
        sender.send(f"{type(error).__name__}: {error}")
    finally:
        dist.destroy_process_group()
