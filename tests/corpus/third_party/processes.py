"""A process for each model, with a limit of time, and one for each rank where threads do not do."""

from __future__ import annotations

import datetime
import os
import pickle
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from tests.corpus.third_party.measure import Outcome, all_of, compared, failed, is_double, measure
from tests.corpus.third_party.row import Row

__all__ = ["outcome_of"]

LIMIT_S = 120.0


def outcome_of(row: Row, ranks: int, how: str) -> Outcome:
    """``how``: ``threads`` or ``ranks``."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ringfx-third-party-") as folder:
        found = _one(row, ranks, how, Path(folder))
    return replace(found, seconds=round(time.monotonic() - started, 1))


def _one(row: Row, ranks: int, how: str, folder: Path) -> Outcome:
    if how == "threads":
        found = _in_process(folder / how, lambda: measure(row, ranks))
        return found or Outcome(verdict="error", why=("make_fx traces no program of it",))  # type: ignore[return-value]
    double = _in_process(folder / "type", lambda: is_double(row))
    if isinstance(double, Outcome):
        return double
    dtype = torch.float64 if double else torch.float32
    children = [
        _begun(folder / str(rank), lambda rank=rank: _as_rank(row, dtype, rank, ranks, folder))  # type: ignore[misc]
        for rank in range(ranks)
    ]
    deadline = time.monotonic() + LIMIT_S
    return all_of([_ended(child, folder / str(r), deadline) for r, child in enumerate(children)])  # type: ignore[misc]


def _as_rank(row: Row, dtype: torch.dtype, rank: int, ranks: int, folder: Path) -> Outcome:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = torch._C._distributed_c10d.FileStore(str(folder / "store"), ranks)
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=limit)
    found = compared(row, dtype)
    if found.verdict not in ("error", "refused"):
        dist.barrier()  # nobody leaves while a neighbour still needs it
    return found


def _in_process(place: Path, work: Callable[[], object]) -> object:
    return _ended(_begun(place, work), place, time.monotonic() + LIMIT_S)


def _begun(place: Path, work: Callable[[], object]) -> int:
    child = os.fork()
    if child:
        return child
    try:
        try:
            result = work()
        except Exception as error:
            result = failed(error, "unsplit", torch.float64)
        place.with_suffix(".part").write_bytes(pickle.dumps(result))
        place.with_suffix(".part").rename(place)
    finally:
        os._exit(0)


def _ended(child: int, place: Path, deadline: float) -> object:
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    if place.exists():
        return pickle.loads(place.read_bytes())
    return Outcome(verdict="error", why=(f"no result in {LIMIT_S:.0f} s",))
