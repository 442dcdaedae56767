"""One variant on several numbers of ranks for the price of one Dynamo trace.

Three quarters of a tiny model's time is Dynamo's. What it hands to the backend is the same on every
rank and for every number of ranks, so a process traces once and forks a rank for each place just
before ringfx takes over; everything from there on (passes, messages, backward) is each rank's own.
``make test`` runs its part of the corpus without this, in processes that were spawned apart.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import os
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Never

import torch
import torch.distributed as dist

from ringfx.comm.grad_accumulation import Accumulation
from ringfx.comm.world import World
from ringfx.compile.backend import Backend
from tests.corpus.measure import Outcome, measure

__all__ = ["outcomes", "warm_up"]

LIMIT_S = 150.0
"""For each number of ranks; one that hangs longer is ended and says where it was."""
COLLECTIVE_LIMIT_S = 60.0
BEFORE = "trace"
"""Stands for ranks in the names of files that a process wrote before it forked any."""


def warm_up() -> None:
    """Imports and caches that every later process inherits."""
    torch.set_num_threads(1)
    measure("llama/sdpa")
    torch._dynamo.reset()


def outcomes(name: str, world_sizes: Sequence[int]) -> Mapping[int, list[Outcome]]:
    """The variant's outcomes by rank, for each number of ranks."""
    with tempfile.TemporaryDirectory(prefix="ringfx-corpus-") as folder:
        child = os.fork()
        if child == 0:
            os.setsid()
            _trace(name, tuple(world_sizes), Path(folder))
        _wait(child, LIMIT_S * (len(world_sizes) + 1))
        return {n: _read(Path(folder), n) for n in world_sizes}


def _trace(name: str, world_sizes: Sequence[int], folder: Path) -> Never:
    """The first process of a variant: it traces, becomes the ranks' parent, and ends."""
    place = [BEFORE]
    original = Backend._agree_on_profile

    def forking(self: Backend, device: torch.device) -> None:
        """The first thing that a call does."""
        Backend._agree_on_profile = original  # type: ignore[method-assign]
        place[0] = _fork_ranks(world_sizes, folder)
        self.world = World.of(None)
        self.accumulation = Accumulation(self.world.group)
        original(self, device)

    Backend._agree_on_profile = forking  # type: ignore[method-assign]
    _say_where_when_asked(folder / BEFORE)
    try:
        outcome = measure(name)
        if dist.is_initialized() and not outcome.error:
            dist.barrier()  # nobody leaves while a neighbour still needs it
        (folder / place[0]).write_bytes(pickle.dumps(outcome))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _fork_ranks(world_sizes: Sequence[int], folder: Path) -> str:
    """Returns in every rank, with its place; never in the process that forks them."""
    for size in world_sizes:
        children = []
        for rank in range(size):
            child = os.fork()
            if child == 0:
                _become(rank, size, folder)
                return f"{size}.{rank}"
            children.append(child)
        for child in children:
            _wait(child, LIMIT_S + 5)
    os._exit(0)


def _become(rank: int, size: int, folder: Path) -> None:
    _say_where_when_asked(folder / f"{size}.{rank}")
    if size == 1:
        return
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = torch._C._distributed_c10d.FileStore(str(folder / f"{size}.store"), size)
    limit = datetime.timedelta(seconds=COLLECTIVE_LIMIT_S)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)


def _say_where_when_asked(place: Path) -> None:
    """SIGUSR1 writes the Python stacks (a watchdog thread would not survive the fork)."""
    stacks = place.with_name(f"{place.name}.stack").open("w")
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)


def _wait(child: int, limit_s: float) -> None:
    """Until the child ends; after the limit it and what it started are killed."""
    deadline = time.monotonic() + limit_s
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGUSR1)
                time.sleep(0.5)
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)


def _read(folder: Path, size: int) -> list[Outcome]:
    before = folder / BEFORE
    if before.exists():  # it never reached the compiler, or raised before
        return [pickle.loads(before.read_bytes())] * size
    return [_read_rank(folder / f"{size}.{rank}") for rank in range(size)]


def _read_rank(path: Path) -> Outcome:
    if path.exists():
        outcome: Outcome = pickle.loads(path.read_bytes())
        return outcome
    stacks = path.with_name(f"{path.name}.stack")
    if not stacks.exists():
        stacks = path.with_name(f"{BEFORE}.stack")
    text = stacks.read_text() if stacks.exists() else ""
    return Outcome(seconds=LIMIT_S, error=f"{'HANG' if text else 'CRASH'}: {text[-3000:]}")
