"""Real ranks of which one dies or stops while it sends its n-th message.

Ranks are forked from a server that has torch loaded, so that one costs a tenth of a second.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import signal
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ringfx import ops
from ringfx.comm.process_group import Ranks

__all__ = ["Survivor", "survivors"]

TIMEOUT_S = 4.0
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.failures.warm"])


@dataclass(frozen=True, kw_only=True)
class Survivor:
    """What one rank saw: the error's class and text ("" for none), and after how long."""

    rank: int
    error: str
    text: str
    seconds: float
    hung: bool = False


def _stop_at(message: int, how: signal.Signals) -> None:
    """Makes this process receive a signal as it starts its n-th message."""
    original, seen = Ranks.guarded, [0]

    def guarded(self: Ranks, operation: str, peers: str, call: Any) -> Any:
        seen[0] += 1
        if seen[0] == message:
            os.kill(os.getpid(), how)
        return original(self, operation, peers, call)

    Ranks.guarded = guarded  # type: ignore[method-assign]


def _rank(
    rank: int,
    size: int,
    folder: str,
    strategy: str,
    victim: int,
    message: int,
    how: signal.Signals,
    pipe: Connection,
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=TIMEOUT_S),
    )
    torch.manual_seed(rank)
    q = torch.randn(1, 4 * size, 32, 16, requires_grad=True)
    dist.barrier()
    if rank == victim:
        _stop_at(message, how)
    start, error, text = time.monotonic(), "", ""
    try:
        for _ in range(2):
            out = ops.ring_attention(
                q, q, q, strategy=strategy, causal=True, layout="zigzag", name="layers.7"
            )
            out.sum().backward()
    except Exception as raised:
        error, text = type(raised).__name__, str(raised)
    pipe.send((error, text, time.monotonic() - start))
    pipe.close()
    os._exit(0)


def survivors(
    *, size: int, strategy: str, victim: int, message: int, how: signal.Signals
) -> list[Survivor]:
    """Runs two steps with a victim and says what happened to all others."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o700)
        ranks = []
        for rank in range(size):
            ours, theirs = _CONTEXT.Pipe()
            arguments = (rank, size, folder, strategy, victim, message, how, theirs)
            process = _CONTEXT.Process(target=_rank, args=arguments, daemon=True)
            process.start()
            theirs.close()
            ranks.append((process, ours))
        for rank, (_process, pipe) in enumerate(ranks):
            if rank == victim:
                continue
            if not pipe.poll(4 * TIMEOUT_S + 20):
                found.append(Survivor(rank=rank, error="", text="", seconds=0.0, hung=True))
                continue
            try:
                error, text, seconds = pipe.recv()
            except EOFError:
                error, text, seconds = "died", "the process ended without an answer", 0.0
            found.append(Survivor(rank=rank, error=error, text=text, seconds=seconds))
        for process, _ in ranks:
            process.kill()
            process.join()
    return found
