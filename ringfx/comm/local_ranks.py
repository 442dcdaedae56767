"""Ranks on this machine: processes that are started once and given functions to run.

Starting a rank costs seconds (a process, torch, a process group), so ranks are kept for the next
call. What makes calls independent is done on each of them: a new process group and, where asked
for, what ``before_call`` does. Ranks of which one failed are ended; the next call starts new ones.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import multiprocessing
import multiprocessing.util
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ringfx.errors import CommunicationError
from ringfx.torch_compat.distributed import PrefixStore, Store, TCPStore

__all__ = ["LocalRanks", "OnReport", "can_inherit"]

OnReport = Callable[[int, Any], None]
"""(rank, what it reports) -> nothing; called in the process that started the ranks."""

HOST = "127.0.0.1"
GRACE_S = 20.0
"""After one rank failed the others may still fail by themselves, which says more than a kill."""
EXIT_S = 5.0
"""Idle ranks leave by themselves when their pipe closes."""


@dataclass(frozen=True, kw_only=True)
class _Setup:
    """What all ranks are started with."""

    num_ranks: int
    device: str
    threads: int
    timeout_s: float
    before_call: Callable[[], None] | None
    output: Path | None


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What a rank is asked to do; ``payload`` is the pickled (function, args, kwargs)."""

    number: int
    payload: bytes
    reports: bool


@dataclass(frozen=True, kw_only=True)
class _Report:
    value: Any


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


class LocalRanks:
    """``num_ranks`` processes that are ranks of one group, started at the first call.

    Use in a script needs ``if __name__ == "__main__":``, as each process imports it anew.

    Parameters
    ----------
    device
        "cpu": messages go through gloo over loopback. "cuda": rank r has card r, and NCCL.
    threads
        Of each rank.
    timeout_s
        Seconds that a call may take; None: as long as it takes.
    collective_timeout_s
        Seconds that ranks wait for each other in one collective.
    before_call
        Runs on each rank before each call, before its process group is made.
    output
        File for what the ranks print; by default they print where this process does.
    inherit
        The processes are forked: functions and arguments of the first call need not be importable
        or picklable, and what was changed in this process is changed there. Not possible where a
        process group or an accelerator is in use (``can_inherit``).

    For example, with one result a rank, in order::

        with LocalRanks(2) as ranks:
            results = ranks.run(function, 1, key=2)
    """

    def __init__(
        self,
        num_ranks: int,
        *,
        device: str = "cpu",
        threads: int = 1,
        timeout_s: float | None = None,
        collective_timeout_s: float = 600.0,
        before_call: Callable[[], None] | None = None,
        output: Path | None = None,
        inherit: bool = False,
    ) -> None:
        self.num_ranks = num_ranks
        self.timeout_s = timeout_s
        self._inherit = inherit
        self._setup = _Setup(
            num_ranks=num_ranks, device=device, threads=threads, timeout_s=collective_timeout_s,
            before_call=before_call, output=output,
        )  # fmt: skip
        self._ranks: list[_Rank] = []
        self._store: TCPStore | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._calls = 0

    def __enter__(self) -> LocalRanks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(
        self,
        function: Callable[..., Any],
        *args: Any,
        timeout_s: float | None = None,
        on_report: OnReport | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """Calls ``function(*args, **kwargs)`` on every rank and returns the results by rank.

        The function must be importable by its qualified name; it learns its rank from
        ``torch.distributed``. Arguments and results travel pickled. With ``on_report`` it is given
        ``report=``, a function whose argument comes out here while the call goes on.

        Raises
        ------
        CommunicationError
            A rank raised, died, or did not answer within ``timeout_s`` seconds; the text names it
            and holds its traceback, or where it was.
        """
        payload = pickle.dumps((function, args, kwargs))
        if not self._ranks:
            self._start()
        self._calls += 1
        for rank in self._ranks:
            job = _Job(number=self._calls, payload=payload, reports=on_report is not None)
            rank.pipe.send(job)
        try:
            limit_s = self.timeout_s if timeout_s is None else timeout_s
            answers = self._collect(limit_s, on_report)
        except BaseException:
            self.close()
            raise
        return [pickle.loads(answer.result or b"") for answer in answers]

    def close(self) -> None:
        """Ends the processes; the next call starts new ones."""
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
        context = multiprocessing.get_context("fork" if self._inherit else "spawn")
        # This process serves the store at a port of the kernel's choice: no race for a free one.
        self._store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
        self._folder = tempfile.TemporaryDirectory(prefix="ringfx-ranks-")
        port = self._store.port
        for rank in range(self.num_ranks):
            ours, theirs = context.Pipe()
            stacks = Path(self._folder.name, f"rank{rank}.txt")
            with _environment(**_variables(self._setup)), warnings.catch_warnings():
                # A forked rank runs one thread, and none of this process's is waited for.
                warnings.filterwarnings("ignore", "This process .* is multi-threaded")
                process = context.Process(  # type: ignore[attr-defined]
                    target=_work, args=(self._setup, rank, port, stacks, theirs), daemon=True
                )
                process.start()
            theirs.close()
            self._ranks.append(_Rank(process, ours, stacks))

    def _collect(self, limit_s: float | None, on_report: OnReport | None) -> list[_Answer]:
        deadline = None if limit_s is None else time.monotonic() + limit_s
        waiting = {rank.pipe: number for number, rank in enumerate(self._ranks)}
        answers: dict[int, _Answer] = {}
        while waiting:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready = wait(list(waiting), timeout=left)
            if not ready:
                break
            for pipe in ready:
                number = waiting[pipe]  # type: ignore[index]
                found = self._receive(number)
                if isinstance(found, _Report):
                    assert on_report is not None, "a rank reports where it was asked to"
                    on_report(number, found.value)
                    continue
                del waiting[pipe]  # type: ignore[arg-type]
                answers[number] = found
                if found.error is not None:
                    deadline = min(deadline or float("inf"), time.monotonic() + GRACE_S)
        failures = [self._failure(n, answers.get(n), limit_s) for n in range(self.num_ranks)]
        text = "\n".join(failure for failure in failures if failure)
        if text:
            raise CommunicationError(
                f"{text}\nDo: mend what the rank that failed first says above."
            )
        return [answers[number] for number in range(self.num_ranks)]

    def _receive(self, number: int) -> _Answer | _Report:
        rank = self._ranks[number]
        try:
            found: _Answer | _Report = rank.pipe.recv()
            return found
        except (EOFError, OSError):
            rank.process.join(timeout=5)
            return _Answer(error=f"the process died, exit code {rank.process.exitcode}")

    def _failure(self, number: int, answer: _Answer | None, limit_s: float | None) -> str:
        where = f"rank {number} of {self.num_ranks}"
        if answer is None:
            limit = "others failed" if limit_s is None else f"limit {limit_s:g} s"
            return f"{where} did not answer ({limit}); it was at\n" + self._where(number)
        return "" if answer.error is None else f"{where}: {answer.error}"

    def _where(self, number: int) -> str:
        """The Python stacks of a rank that hangs."""
        rank = self._ranks[number]
        with contextlib.suppress(OSError, TypeError):
            os.kill(rank.process.pid, signal.SIGUSR1)
            time.sleep(0.5)
        return rank.stacks.read_text() if rank.stacks.exists() else "an unknown place"


def can_inherit() -> bool:
    """Whether ranks may be forked from this process: torch forbids it once a device has threads."""
    has_fork = "fork" in multiprocessing.get_all_start_methods()
    is_grouped = dist.is_available() and dist.is_initialized()
    return has_fork and not is_grouped and not torch.accelerator.is_available()


def _variables(setup: _Setup) -> dict[str, str]:
    """Libraries read them while they are imported."""
    threads = str(setup.threads)
    loopback = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    return {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, **loopback}


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Sets variables that a spawned child inherits."""
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


# --- in the rank's process ------------------------------------------------------------------------


def _work(setup: _Setup, rank: int, port: int, stacks: Path, pipe: Connection) -> None:
    """The life of one rank: calls until the process that started it hangs up."""
    # A forked rank has what this process put in their place, perhaps with a lock that was held.
    sys.stdout, sys.stderr = sys.__stdout__ or sys.stdout, sys.__stderr__ or sys.stderr
    if setup.output is not None:
        with setup.output.open("a") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
    torch.set_num_threads(setup.threads)
    if setup.device == "cuda":
        torch.cuda.set_device(rank)
    size = str(setup.num_ranks)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    timeout = datetime.timedelta(seconds=setup.timeout_s)
    with stacks.open("w") as file:
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
        store = TCPStore(HOST, port, is_master=False, timeout=timeout)
        while True:
            try:
                job: _Job = pipe.recv()
            except (EOFError, OSError):
                # Gives back the semaphores of libraries, or the parent warns about them.
                multiprocessing.util._exit_function()  # type: ignore[attr-defined]
                sys.stdout.flush()
                os._exit(0)  # tearing torch down takes seconds, and there is nothing to save
            call_store = PrefixStore(f"call{job.number}", store)
            pipe.send(_answer(job, setup, rank, call_store, pipe))


def _answer(job: _Job, setup: _Setup, rank: int, store: Store, pipe: Connection) -> _Answer:
    try:
        if setup.before_call is not None:
            setup.before_call()
        dist.init_process_group(
            "nccl" if setup.device == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=setup.num_ranks,
            timeout=datetime.timedelta(seconds=setup.timeout_s),
        )
        function, args, kwargs = pickle.loads(job.payload)
        if job.reports:
            kwargs["report"] = lambda value: pipe.send(_Report(value=value))
        result = pickle.dumps(function(*args, **kwargs))
        dist.barrier()  # nobody leaves the group while a neighbour still needs it
        dist.destroy_process_group()
        return _Answer(result=result)
    except BaseException:
        answer = _Answer(error=traceback.format_exc())
        with contextlib.suppress(Exception):
            dist.destroy_process_group()  # neighbours that wait for this rank hear of it at once
        return answer
