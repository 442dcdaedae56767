"""A reusable pool of gloo ranks on this machine.

Starting a rank costs seconds (a process, torch, a process group), so a session keeps a few pools
and every test borrows one. What makes tests independent is done on each call: a new process group,
``torch._dynamo.reset()`` and the same random seed. A pool in which anything failed is thrown away.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import getpass
import multiprocessing
import multiprocessing.util
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

__all__ = ["RankError", "RankPool", "avoid_broken_kernels", "error_text", "raises"]

HOST = "127.0.0.1"
GRACE_S = 20.0
"""After one rank failed the others may still fail by themselves, which says more than a kill."""
EXIT_S = 5.0
"""Idle ranks leave by themselves when their pipe closes."""


class RankError(RuntimeError):
    """A rank raised, died or did not answer; the text names the rank and holds its traceback."""


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What a rank is asked to do; ``payload`` is the pickled (function, args, kwargs)."""

    number: int
    payload: bytes


@dataclass(frozen=True, kw_only=True)
class _Answer:
    result: bytes | None = None
    error: str | None = None


@dataclass(frozen=True, eq=False)
class _Rank:
    process: Any
    pipe: Connection
    stacks: Path
    """Where the rank writes its Python stacks when it is asked to by SIGUSR1."""


class RankPool:
    """``world_size`` gloo ranks, started at the first call and kept for the next ones.

    >>> pool = RankPool(2)                                              # doctest: +SKIP
    >>> pool.run(function, 1, key=2)  # one result a rank, in order     # doctest: +SKIP
    """

    def __init__(
        self, world_size: int, *, timeout_s: float = 600.0, collective_timeout_s: float = 240.0
    ) -> None:
        self.world_size = world_size
        self.timeout_s = timeout_s
        self.collective_timeout_s = collective_timeout_s
        self._ranks: list[_Rank] = []
        self._store: TCPStore | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._calls = 0

    def run(
        self,
        function: Callable[..., Any],
        *args: Any,
        timeout_s: float | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """Calls ``function(*args, **kwargs)`` on every rank and returns the results by rank.

        The function must be importable by its qualified name; it learns its rank from
        ``torch.distributed``. Arguments and results travel pickled.

        Raises
        ------
        RankError
            A rank raised, died, or did not answer within ``timeout_s`` seconds.
        """
        payload = pickle.dumps((function, args, kwargs))
        if not self._ranks:
            self._start()
        self._calls += 1
        for rank in self._ranks:
            rank.pipe.send(_Job(number=self._calls, payload=payload))
        try:
            answers = self._collect(self.timeout_s if timeout_s is None else timeout_s)
        except BaseException:
            self.close()
            raise
        return [pickle.loads(answer.result or b"") for answer in answers]

    def close(self) -> None:
        """Ends the processes of this pool; the next call starts new ones."""
        for rank in self._ranks:
            with contextlib.suppress(OSError):
                rank.pipe.close()
        deadline = time.monotonic() + EXIT_S
        for rank in self._ranks:
            rank.process.join(timeout=max(0.0, deadline - time.monotonic()))
            rank.process.kill()  # for those that hang; of no effect on the others
            rank.process.join()
        self._ranks = []
        self._store = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        # The parent serves the store at a port of the kernel's choice: no race for a free one.
        self._store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
        self._folder = tempfile.TemporaryDirectory(prefix="ringfx-ranks-")
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            stacks = Path(self._folder.name, f"rank{rank}.txt")
            setup = _Setup(
                rank=rank,
                world_size=self.world_size,
                port=self._store.port,
                timeout_s=self.collective_timeout_s,
                stacks=stacks,
            )
            with _environment(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo"):
                process = context.Process(target=_work, args=(setup, theirs), daemon=True)
                process.start()
            theirs.close()
            self._ranks.append(_Rank(process, ours, stacks))

    def _collect(self, timeout_s: float) -> list[_Answer]:
        deadline = time.monotonic() + timeout_s
        waiting = {rank.pipe: number for number, rank in enumerate(self._ranks)}
        answers: dict[int, _Answer] = {}
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                number = waiting.pop(pipe)  # type: ignore[call-overload]
                answers[number] = self._receive(number)
                if answers[number].error is not None:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        failures = [self._failure(n, answers.get(n), timeout_s) for n in range(self.world_size)]
        text = "\n".join(failure for failure in failures if failure)
        if text:
            raise RankError(text)
        return [answers[number] for number in range(self.world_size)]

    def _receive(self, number: int) -> _Answer:
        rank = self._ranks[number]
        try:
            answer: _Answer = rank.pipe.recv()
            return answer
        except (EOFError, OSError):
            rank.process.join(timeout=5)
            return _Answer(error=f"the process died, exit code {rank.process.exitcode}")

    def _failure(self, number: int, answer: _Answer | None, timeout_s: float) -> str:
        where = f"rank {number} of {self.world_size}"
        if answer is None:
            return f"{where} did not answer (limit {timeout_s:g} s); it was at\n" + self._where(
                number
            )
        return "" if answer.error is None else f"{where}: {answer.error}"

    def _where(self, number: int) -> str:
        """The Python stacks of a rank that hangs."""
        rank = self._ranks[number]
        with contextlib.suppress(OSError, TypeError):
            os.kill(rank.process.pid, signal.SIGUSR1)
            time.sleep(0.5)
        return rank.stacks.read_text() if rank.stacks.exists() else "an unknown place"


@dataclass(frozen=True, kw_only=True)
class _Setup:
    rank: int
    world_size: int
    port: int
    timeout_s: float
    stacks: Path


@contextlib.contextmanager
def _environment(**values: str) -> Any:
    """Sets variables that a spawned child inherits (libraries read them while being imported)."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def avoid_broken_kernels() -> None:
    """Lets unsplit models run where ATEN_CPU_CAPABILITY makes a lesser processor of this one.

    On processors with matrix units torch's fused attention fails there in bfloat16, since it asks
    oneDNN for them; and Inductor takes programs of the real processor from its cache, which the
    lesser one's headers refuse.
    """
    if played := os.environ.get("ATEN_CPU_CAPABILITY"):
        own_cache = Path(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}_{played}")
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(own_cache))
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")  # read when oneDNN is first asked


def _work(setup: _Setup, pipe: Connection) -> None:
    """The life of one rank: jobs until the parent hangs up."""
    torch.set_num_threads(1)
    avoid_broken_kernels()
    os.environ.update(
        RANK=str(setup.rank), LOCAL_RANK=str(setup.rank), WORLD_SIZE=str(setup.world_size)
    )
    timeout = datetime.timedelta(seconds=setup.timeout_s)
    with setup.stacks.open("w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
        store = TCPStore(HOST, setup.port, is_master=False, timeout=timeout)
        while True:
            try:
                job: _Job = pipe.recv()
            except (EOFError, OSError):
                # Gives back the semaphores of libraries, or the parent warns about them.
                multiprocessing.util._exit_function()  # type: ignore[attr-defined]
                os._exit(0)  # tearing torch down takes seconds, and there is nothing to save
            pipe.send(_answer(job, setup, PrefixStore(f"call{job.number}", store)))


def _answer(job: _Job, setup: _Setup, store: Store) -> _Answer:
    torch._dynamo.reset()
    torch.manual_seed(0)
    try:
        dist.init_process_group(
            "gloo",
            store=store,
            rank=setup.rank,
            world_size=setup.world_size,
            timeout=datetime.timedelta(seconds=setup.timeout_s),
        )
        function, args, kwargs = pickle.loads(job.payload)
        result = pickle.dumps(function(*args, **kwargs))
        dist.barrier()  # nobody leaves the group while a neighbour still needs it
        dist.destroy_process_group()
        return _Answer(result=result)
    except BaseException:
        answer = _Answer(error=traceback.format_exc())
        with contextlib.suppress(Exception):
            dist.destroy_process_group()  # neighbours that wait for this rank hear of it at once
        return answer


def error_text(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str | None:
    """``Type: text`` of what the call raises, or None: a result that a rank can send home.

    A test of a refusal runs this on the ranks, so that the expected error does not cost the pool.
    """
    try:
        function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def raises(pool: RankPool, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[str]:
    """The error text of every rank; fails if a rank raises nothing."""
    texts = pool.run(error_text, function, *args, **kwargs)
    silent = [rank for rank, text in enumerate(texts) if text is None]
    assert not silent, f"ranks {silent} raised nothing; the others: {texts}"
    return texts
