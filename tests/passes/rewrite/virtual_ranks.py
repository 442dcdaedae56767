"""Ranks that are threads of this process, one of which runs at a time: a split program in a moment.

A rank runs until it has a message for the others, then the next one does; so what happens has one
order, and each rank can have random numbers of its own, as processes have.
"""

from __future__ import annotations

import functools
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from unittest import mock

import torch

from ringfx.comm import collective_ops
from ringfx.comm.process_group import Ranks, Transfer

__all__ = ["run_on_ranks"]

Tensor = torch.Tensor
T = TypeVar("T")


MOST_TURNS = 1000
"""That a rank waits in vain before it is said to wait for ever."""


class _Left(Exception):
    """Another rank failed: this one waits for nobody."""


class _Room:
    """What the ranks have for each other; whoever has the turn runs."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.meetings = [0] * size
        """How many each rank has come to."""
        self.brought: dict[tuple[int, int], Any] = {}
        """By meeting and rank."""
        self.sent: dict[tuple[int, int, int], deque[Tensor]] = defaultdict(deque)
        """By sender, receiver and tag."""
        self._random = [torch.get_rng_state()] * size
        self._turn = [threading.Semaphore(0) for _ in range(size)]
        self._ended = 0
        self._errors: list[BaseException] = []

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        results: list[Any] = [None] * self.size

        def live(rank: int) -> None:
            _HERE.room, _HERE.rank = self, rank
            self._take_turn(rank)
            try:
                if not self._errors:
                    results[rank] = work(rank)
            except _Left:
                pass
            except BaseException as error:
                self._errors.append(error)
            self._ended += 1
            while self._ended < self.size:
                self._pass_on(rank)
            self._turn[(rank + 1) % self.size].release()

        threads = [threading.Thread(target=live, args=(r,)) for r in range(self.size)]
        for thread in threads:
            thread.start()
        self._turn[0].release()
        for thread in threads:
            thread.join()
        if self._errors:
            raise self._errors[0]
        return results

    def wait(self, rank: int, has_come: Callable[[], bool], what: str) -> None:
        for _ in range(MOST_TURNS):
            if self._errors:
                raise _Left
            if has_come():
                return
            self._pass_on(rank)
        raise RuntimeError(f"rank {rank} waits for ever: {what}")

    def _pass_on(self, rank: int) -> None:
        self._random[rank] = torch.get_rng_state()
        self._turn[(rank + 1) % self.size].release()
        self._take_turn(rank)

    def _take_turn(self, rank: int) -> None:
        self._turn[rank].acquire()
        torch.set_rng_state(self._random[rank])


_HERE = threading.local()


@dataclass(frozen=True, eq=False)
class _Here(Ranks):
    """This thread's place among the ranks."""

    @property
    def _sends_one_by_one(self) -> bool:
        return False

    def _meet(self, what: str, brought: Any) -> list[Any]:
        """What all ranks bring."""
        room, number = _HERE.room, _HERE.room.meetings[self.rank]
        room.meetings[self.rank] += 1
        room.brought[number, self.rank] = brought
        keys = [(number, r) for r in range(self.size)]
        room.wait(self.rank, lambda: all(k in room.brought for k in keys), what)
        return [room.brought[k] for k in keys]

    def guarded(self, operation: str, peers: str, call: Callable[[], T]) -> T:
        return call()

    def start(self, transfers: Sequence[Transfer]) -> list[Any]:
        for t in transfers:
            if t.sends:
                _HERE.room.sent[self.rank, t.peer, t.tag].append(t.buffer.clone())
        return [_Work(self.rank, t) for t in transfers]

    def fewest_threads(self) -> int:
        return 1

    def all_gather(self, operation: str, local: Tensor) -> Tensor:
        return torch.stack(self._meet(operation, local.clone()))

    def all_reduce(self, operation: str, partial: Tensor) -> Tensor:
        return partial.copy_(_total(self._meet(operation, partial.clone())))

    def largest(self, operation: str, x: Tensor) -> Tensor:
        return x.copy_(functools.reduce(torch.maximum, self._meet(operation, x.clone())))

    def reduce_scatter(self, operation: str, parts: Tensor) -> Tensor:
        return _total([p[self.rank] for p in self._meet(operation, parts.clone())])

    def all_to_all(self, operation: str, parts: Tensor) -> Tensor:
        return torch.stack([p[self.rank] for p in self._meet(operation, parts.clone())])


def _total(parts: Sequence[Tensor]) -> Tensor:
    """In the order of ranks; torch's own sum would begin with 0, which makes 0 of -0."""
    return functools.reduce(torch.add, parts)


@dataclass(frozen=True)
class _Work:
    """A message on its way."""

    rank: int
    transfer: Transfer

    def wait(self) -> None:
        t = self.transfer
        if not t.sends:
            post = _HERE.room.sent[t.peer, self.rank, t.tag]
            _HERE.room.wait(self.rank, lambda: len(post) > 0, f"a message of rank {t.peer}")
            t.buffer.copy_(post.popleft())


def _named(group: str, layer: str) -> Ranks:
    if not group:  # what is replicated runs on each rank alone
        return Ranks(0, 1, None, layer)
    return _Here(_HERE.rank, _HERE.room.size, _HERE.room, layer)


def _begin(flat: Tensor, group: str, what: str) -> None:
    _named(group, what).all_reduce(what, flat)
    collective_ops._SUMS.begin(flat, collective_ops._nothing)


def run_on_ranks(size: int, work: Callable[[int], Any]) -> list[Any]:
    """``work(rank)`` on every rank; each begins with the random numbers that the caller has."""
    with (
        mock.patch.object(Ranks, "named", staticmethod(_named)),
        mock.patch.object(collective_ops, "_begin", _begin),
    ):
        return _Room(size).run(work)
