"""Reports of failures between the ranks of a group: which rank failed, where, and why.

A rank that fails would leave the others waiting. So each failure is posted under one key of the
group's store, and the connections of the ranks are closed: a rank that waits learns of
it at once, reads the key, and raises an error with the cause.

Connections are ringfx's own (gloo), so that the user's group stays as it is. Those of one *epoch*
are made together; a failure ends the epoch for the rank that failed and for all that waited for
it, and the next message is sent over new ones. A failure in a call of the model that a rank has
left behind without an error is no concern of its next call: it moves up to the new epoch.

The number of keys is constant: ``failed``, ``gone``, and three for each rank.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ringfx.failures.describe import describe_error, plain
from ringfx.failures.process import Process
from ringfx.failures.wait_graph import Counts, Stand
from ringfx.torch_compat.distributed import PrefixStore, default_store, group_named, timeout_of

__all__ = [
    "Channel",
    "Failure",
    "Wait",
    "channel_of",
    "channels",
    "is_settled",
    "next_number",
    "settled",
    "shared_call",
]

E = TypeVar("E", bound=BaseException)

GONE = EVERY_CALL = 1 << 60
"""Epoch of the failure of a rank that does not come back; a call that no rank has left behind."""

GRACE_S = 1.5
"""How long a broken connection waits for its cause: a rank posts it, then closes."""

CLOSE_AFTER_S = 0.3
"""Connections are given up so long after a failure: what all ranks fail of is raised by each."""

POLL_S = (0.002, 0.2)
"""Between two looks at the store while a group's connections are made, at first and at most."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What ended an epoch: on which rank, in which of its calls, in words."""

    epoch: int
    call: int
    rank: int
    text: str
    is_error: bool = True
    """Otherwise a rank has ended as it should, and concerns those that it should meet."""

    def is_of(self, rank: int) -> bool:
        """Whether that rank has failed, and did not only find out that all have."""
        return self.rank == rank and self.call != EVERY_CALL

    def ends(self, wait: Wait) -> bool:
        return self.is_error or wait.is_meeting


@dataclass(frozen=True, kw_only=True)
class Wait:
    """What a rank waits in. In a meeting all ranks come together, from whatever they do."""

    number: int
    what: str
    is_meeting: bool
    since: float


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a rank is, as it says when connections are made."""

    epoch: int
    call: int


class Channel:
    """One rank's end. ``ringfx.failures.watchdog`` looks at it while a message is due."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank, self.size = group.rank(), group.size()
        self.name = group.group_name
        self.timeout = _timeout(group)
        self.epoch, self.call = 0, 0
        self.wait: Wait | None = None
        self.others: list[_Place] = []
        self.agreed: dict[Any, Any] = {}
        """What the ranks of this epoch have agreed on."""
        self.made = 0
        """Values that were handed out in this epoch."""
        self.retired: list[tuple[float, Any]] = []
        """Connections that were given up, and when."""
        self.has_met = False
        """Whether a message of this call has come."""
        self.counts = Counts.none(self.size)
        self.heard: Failure | None = None
        """The last failure that was read: the store may end with the rank that serves it."""
        self._waits = 0
        self._processes: dict[int, Process] = {}
        self._twin: Any = None
        default = default_store()
        self._given_store = default
        self.store = self._prefixed(default)

    def clone_of_store(self) -> Any:
        """For another thread: a store answers one at a time."""
        return self._prefixed(self._given_store.clone())

    def _prefixed(self, store: Any) -> Any:
        return PrefixStore(f"ringfx/{self.name}", store)

    # --- connections

    def twin(self) -> Any:
        """The connections of this epoch; the first message makes them, on all ranks together."""
        if self._twin is None:
            from ringfx.failures.watchdog import watch

            watch(self)
            with self.waits("the other ranks", is_meeting=True):
                self._join()
        return self._twin

    def _join(self) -> None:
        self._say()
        deadline, pause = time.monotonic() + self.timeout.total_seconds(), POLL_S[0]
        while not self._all_here():
            if time.monotonic() > deadline:
                raise RuntimeError(f"it did not arrive within {self.timeout.total_seconds():.0f} s")
            if (dead := self.dead_rank()) is not None:
                raise RuntimeError(_ended(dead))
            time.sleep(pause)
            pause = min(2 * pause, POLL_S[1])
        self.dead_rank()  # reads which process each is, while there is a store
        self.call = max(self.call, *(place.call for place in self.others))
        store = PrefixStore(f"epoch{self.epoch}", self.store)
        self._twin = dist.ProcessGroupGloo(store, self.rank, self.size, self.timeout)

    def _all_here(self) -> bool:
        failure = self.failure()
        if failure is not None:
            if not self._is_past(failure):
                raise RuntimeError(failure.text)
            self._next_epoch(failure.epoch + 1)
            self._say()
        keys = [f"place{r}" for r in range(self.size)]
        if not all(self.store.check([key]) for key in keys):
            return False
        self.others = [_Place(**json.loads(self.store.get(key))) for key in keys]
        return all(place.epoch >= self.epoch for place in self.others)

    def _say(self) -> None:
        here = _Place(epoch=self.epoch, call=self.call)
        self.introduce()
        self.store.set(f"waits{self.rank}", "")
        self.store.set(f"place{self.rank}", json.dumps(asdict(here)))

    def introduce(self) -> None:
        """Say which process this rank is: another one may look whether it lives."""
        if self.rank not in self._processes:
            self._processes[self.rank] = Process.this()
            self.store.set(f"process{self.rank}", json.dumps(asdict(Process.this())))

    def dead_rank(self, store: Any = None) -> int | None:
        """A rank whose process has ended, as far as that can be seen from here."""
        store = store or self.store
        with contextlib.suppress(RuntimeError):
            for r in range(self.size):
                if r not in self._processes and store.check([f"process{r}"]):
                    self._processes[r] = Process(**json.loads(store.get(f"process{r}")))
        return next((r for r, p in list(self._processes.items()) if p.is_dead()), None)

    # --- calls, waits, failures

    def begin_call(self) -> None:
        """An outermost call of the model."""
        self.call += 1
        self.has_met = False

    @contextlib.contextmanager
    def waits(self, what: str, *, is_meeting: bool = False) -> Iterator[None]:
        """Inside, this rank waits for others."""
        before, self._waits = self.wait, self._waits + 1
        self.wait = before or Wait(
            number=self._waits, what=what, is_meeting=is_meeting, since=time.monotonic()
        )
        try:
            yield
        finally:
            self.wait = before

    def failure(self, store: Any = None) -> Failure | None:
        """What ended this rank's epoch, if anything has."""
        store = store or self.store
        for key in ("failed", "gone"):
            if store.check([key]):
                found = Failure(**json.loads(store.get(key)))
                if found.epoch >= self.epoch:
                    self.heard = found
                    return found
        return None

    def _is_past(self, failure: Failure) -> bool:
        """Whether it ended a call that this rank has left behind without an error."""
        return not self.has_met and failure.call < self.call and failure.epoch != GONE

    def moves_up(self) -> bool:
        """After a message did not come: whether the call may be begun again in a new epoch."""
        failure, _ = self._cause()
        if failure is None or not self._is_past(failure):
            return False
        self._next_epoch(failure.epoch + 1)
        return True

    def post(
        self,
        text: str,
        *,
        gone: bool = False,
        is_error: bool = True,
        of_all: bool = False,
        store: Any = None,
    ) -> None:
        """Say why this rank's epoch ends; what was said first stands.

        ``gone``: this rank does not come back. ``of_all``: no rank may go on as if nothing was.
        """
        store = store or self.store
        epoch = GONE if gone else self.epoch
        call = EVERY_CALL if of_all else self.call
        failure = Failure(epoch=epoch, call=call, rank=self.rank, text=text, is_error=is_error)
        said = json.dumps(asdict(failure))
        key, before = "gone" if gone else "failed", ""
        while True:
            now = store.compare_set(key, before, said).decode()
            if now == said or (now and json.loads(now)["epoch"] >= epoch):
                return
            before = now

    def fail(self, text: str) -> None:
        """This rank gives up what the ranks do together."""
        with contextlib.suppress(RuntimeError):  # the store's process may have ended
            self.post(text)
        self._next_epoch(self.epoch + 1)

    def give_up(self, error: BaseException, doing: str) -> str:
        """Why a message has not come; the error's own text where no rank says more."""
        return self.given_up(error, doing)[1]

    def given_up(self, error: BaseException, doing: str) -> tuple[bool, str]:
        """The same, and whether a rank has said it."""
        failure, why = self._cause()
        if failure is not None:
            self._next_epoch(max(self.epoch, failure.epoch % GONE) + 1)
            return True, failure.text
        text = why or plain(error) or type(error).__name__
        self.fail(f"rank {self.rank} stopped waiting in {doing}: {text}")
        return False, text

    def _cause(self) -> tuple[Failure | None, str]:
        deadline, why = time.monotonic() + GRACE_S, ""
        try:
            while time.monotonic() < deadline:
                failure = self.failure()
                if failure is not None:
                    return failure, ""
                dead = self.dead_rank()
                if dead is not None and time.monotonic() > deadline - GRACE_S / 2:
                    return None, _ended(dead)
                time.sleep(0.05)
        except RuntimeError:
            why = "the store cannot be reached: the process that hosts it has ended"
        if why and self.heard is not None and self.heard.epoch >= self.epoch:
            return self.heard, ""
        while why and not self.known_cause() and time.monotonic() < deadline:
            time.sleep(0.05)  # its connections end before it does
        return None, (self.known_cause() or why) if why else ""

    def known_cause(self) -> str:
        """What is known of other ranks without the store, which may have ended; "" for nothing."""
        if self.heard is not None and self.heard.is_error and not self.heard.is_of(self.rank):
            return self.heard.text
        dead = next((r for r, p in list(self._processes.items()) if p.is_dead()), None)
        return "" if dead is None else _ended(dead)

    def cause_elsewhere(self) -> str:
        """What has ended the ranks' common work on another rank than this; "" for nothing known."""
        failure, why = self._cause()
        if failure is None:
            return why
        return failure.text if failure.is_error and not failure.is_of(self.rank) else ""

    def raised(self, error: BaseException) -> None:
        """An error leaves a call of the model: on this rank only, as far as it knows."""
        if not is_settled(error):
            self.fail(f"rank {self.rank} raised {describe_error(error)}")
            settled(error)

    def _next_epoch(self, epoch: int) -> None:
        self.epoch, self.made = epoch, 0
        self.counts = Counts.none(self.size)
        self.agreed.clear()
        twin, self._twin = self._twin, None
        if twin is not None:
            self.retired.append((time.monotonic(), twin))

    def close(self) -> None:
        """Close the connections: ranks that wait in them notice at once."""
        if self._twin is not None:
            _close(self._twin, self.neighbour())

    def close_retired(self, *, now: bool = False) -> None:
        for entry in list(self.retired):
            if now or time.monotonic() - entry[0] > CLOSE_AFTER_S:
                self.retired.remove(entry)
                _close(entry[1], self.neighbour())

    def ranks_waiting(self) -> dict[int, str]:
        """What other ranks are said to wait in."""
        said = {}
        with contextlib.suppress(RuntimeError):
            for r in range(self.size):
                text = self.store.get(f"waits{r}") if self.store.check([f"waits{r}"]) else b""
                if text and r != self.rank:
                    said[r] = Stand.read(text).what
        return said

    def neighbour(self) -> int:
        return (self.rank + 1) % self.size


def _close(twin: Any, neighbour: int) -> None:
    """gloo ends all connections of a group where one message runs out of time."""
    with contextlib.suppress(RuntimeError):
        twin.recv([torch.empty(1)], neighbour, _NEVER_SENT).wait(datetime.timedelta(milliseconds=1))


_NEVER_SENT = 999_983
"""A tag that no message has."""

CHANNELS: weakref.WeakKeyDictionary[dist.ProcessGroup, Channel] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


def channel_of(group: dist.ProcessGroup) -> Channel:
    """This process's end of the group's channel; no message is sent."""
    with _LOCK:
        if group not in CHANNELS:
            CHANNELS[group] = Channel(group)
        return CHANNELS[group]


@contextlib.contextmanager
def shared_call(group: str, *, begins: bool = True) -> Iterator[None]:
    """An error that leaves it on this rank is reported to the other ranks of the group.

    ``begins``: it is an outermost call of the model, and not a part of one.
    """
    if not group:
        yield
        return
    channel = channel_of(group_named(group))
    if begins:
        channel.begin_call()
    try:
        yield
    except BaseException as error:
        channel.raised(error)
        raise


def next_number(group: str) -> str:
    """Counts what the ranks of a group make, in the same words on all of them."""
    channel = channel_of(group_named(group))
    channel.made += 1
    return f"{channel.epoch}.{channel.made}"


def channels() -> list[Channel]:
    """Of all groups that have one here."""
    with _LOCK:
        return list(CHANNELS.values())


def settled(error: E) -> E:
    """Mark an error of which the other ranks know, or which all of them raise."""
    error.ringfx_settled = True  # type: ignore[attr-defined]
    return error


def is_settled(error: BaseException | None) -> bool:
    """Whether it, or what it was raised for, is known to the other ranks."""
    seen = 0
    while error is not None and seen < 20:
        if getattr(error, "ringfx_settled", False):
            return True
        error, seen = getattr(error, "inner_exception", None) or error.__cause__, seen + 1
    return False


def _ended(rank: int) -> str:
    ended = f"the process of rank {rank} has ended without an error message"
    return f"{ended} (killed? or after destroy_process_group)"


def _timeout(group: dist.ProcessGroup) -> datetime.timedelta:
    """How long the group's own messages wait."""
    return timeout_of(group) or datetime.timedelta(minutes=30)
