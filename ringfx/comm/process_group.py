"""The ranks that share one sequence, and every message that attention sends between them.

All messages of ``ringfx.ops`` pass through here, so that a failure is always an error that names
the layer, the operation and the rank waited for, within the group's timeout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ringfx.comm import stats
from ringfx.errors import CommunicationError, InvalidArgument
from ringfx.failures.channel import Channel, channel_of, is_settled, settled
from ringfx.failures.describe import cure_after
from ringfx.torch_compat.distributed import group_named
from ringfx.torch_compat.releases import all_gather_single, reduce_scatter_single

__all__ = ["Exchange", "Ranks", "Transfer"]

T = TypeVar("T")

PIECE_BYTES, MOST_PIECES = 1 << 18, 256
"""gloo sends a large message in one go while nothing is read, so two that cross take turns on the
wire: 4 MB both ways over 1 Gbit/s took 33 to 67 ms, in pieces of 1/16 33 to 40 (bound 32). Over
loopback a piece costs about 30 us alone, and nothing where 4 MB or more are sent."""


BESIDE_TAG = 1 << 20
"""Of messages that are under way while attention sends its own."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Transfer:
    """A message between this rank and one other."""

    sends: bool
    buffer: torch.Tensor
    peer: int
    tag: int = 0


@dataclass(frozen=True, eq=False)
class Ranks:
    """This rank's place in a group, and the layer on whose behalf it speaks.

    ``group`` is None for one rank without a process group.
    """

    rank: int
    size: int
    group: dist.ProcessGroup | None
    layer: str

    @staticmethod
    def named(group: str, layer: str) -> Ranks:
        """The group of that name, as torch.distributed knows it; "" is one rank alone."""
        if not group:
            return Ranks(0, 1, None, layer)
        try:
            found = group_named(group)
        except RuntimeError as error:
            raise InvalidArgument(
                f"{layer or 'attention'}: no process group is named {group!r} in this process. "
                "Do: call torch.distributed.init_process_group first, and pass a group that still "
                "exists."
            ) from error
        return Ranks(found.rank(), found.size(), found, layer)

    def neighbour(self, distance: int) -> int:
        return (self.rank + distance) % self.size

    @property
    def channel(self) -> Channel:
        """Reports of failures between the ranks, beside their messages."""
        assert self.group is not None, "one rank alone has nobody to talk to"
        return channel_of(self.group)

    @property
    def wire(self) -> Any:
        """What messages go over: connections of our own where the group is gloo's."""
        return self.channel.twin() if self._sends_one_by_one else self.group

    def fewest_threads(self) -> int:
        """The fewest CPU threads that any rank computes with, as agreed at the first message."""
        if self.group is None:
            return torch.get_num_threads()
        agreed = self.channel.agreed
        if "threads" not in agreed:
            fewest = torch.tensor(torch.get_num_threads())
            self.guarded(
                "agreement on threads",
                "all ranks",
                lambda: self.start_sum(fewest, op=dist.ReduceOp.MIN),
            )
            agreed["threads"] = int(fewest)
        found: int = agreed["threads"]
        return found

    def start(self, transfers: Sequence[Transfer]) -> list[Any]:
        """Starts messages that are under way together."""
        if self._sends_one_by_one:
            wire, counts = self.wire, self.channel.counts
            for t in transfers:
                (counts.sent if t.sends else counts.taken)[t.peer] += 1
            return [
                (wire.send if t.sends else wire.recv)([t.buffer], t.peer, t.tag) for t in transfers
            ]
        return dist.batch_isend_irecv(
            [
                dist.P2POp(
                    dist.isend if t.sends else dist.irecv,
                    t.buffer, group=self.group, group_peer=t.peer, tag=t.tag,
                )
                for t in transfers
            ]
        )  # fmt: skip

    def start_sum(self, flat: torch.Tensor, **options: Any) -> Any:
        """``dist.all_reduce`` over the ranks."""
        wire = self.wire
        self.channel.counts.sums += 1
        return dist.all_reduce(flat, group=wire, **options)

    def exchange(
        self,
        operation: str,
        *,
        send: torch.Tensor,
        to: int,
        receive: torch.Tensor,
        source: int,
        tag: int = 0,
    ) -> Exchange:
        """Starts sending one buffer and receiving another, both contiguous; empty ones do not go.

        All ranks call it in the same order. ``tag`` separates messages between the same two ranks
        that are under way together (gloo; NCCL goes by the order).
        """
        assert self.group is not None, "one rank alone has nobody to talk to"
        assert send.is_contiguous(), "buffers are contiguous"
        assert receive.is_contiguous(), "buffers are contiguous"
        sending = [Transfer(sends=True, buffer=x, peer=to, tag=tag) for x in self._pieces(send)]
        taking = [
            Transfer(sends=False, buffer=x, peer=source, tag=tag) for x in self._pieces(receive)
        ]
        both = (sending, taking) if self.rank % 2 == 0 else (taking, sending)
        ops = [op for pair in zip_longest(*both) for op in pair if op is not None]
        peers = f"rank {source} (receiving) and rank {to} (sending)"
        works = self.guarded(operation, peers, lambda: self.start(ops)) if ops else []
        if send.numel():
            self._count(send)
        return Exchange(self, operation, works, [op.peer for op in ops], (send, receive))

    def _pieces(self, message: torch.Tensor) -> Sequence[torch.Tensor]:
        """What a message is sent as: NCCL cuts its messages itself."""
        if not message.numel():
            return ()
        if not self._sends_one_by_one:
            return (message,)
        flat = message.view(-1)
        smallest = -(-flat.numel() // MOST_PIECES)
        return torch.split(flat, max(1, smallest, PIECE_BYTES // message.element_size()))

    def all_gather(self, operation: str, local: torch.Tensor) -> torch.Tensor:
        """Everyone's tensor, stacked: [size, *local.shape]."""
        whole = local.new_empty((self.size, *local.shape))
        if self._sends_one_by_one:
            whole[self.rank].copy_(local)
            self._fill(operation, whole, lambda rank: local)
        else:
            self._count(local)
            self.collective(
                operation,
                lambda: all_gather_single(
                    whole.view(-1), local.contiguous().view(-1), group=self.wire
                ),
            )
        return whole

    def begin_all_gather(
        self, operation: str, local: torch.Tensor
    ) -> tuple[torch.Tensor, Callable[[], None]]:
        """Where everyone's tensor arrives, [size, *local.shape], and what waits for it.

        It is sent from there: a compiler may put other values into ``local`` at once.
        """
        whole = local.new_empty((self.size, *local.shape))
        whole[self.rank].copy_(local)
        if not self._sends_one_by_one:
            self._count(local)
            sent = whole[self.rank].view(-1)
            return whole, self._begun(
                operation,
                lambda: all_gather_single(whole.view(-1), sent, group=self.wire, async_op=True),
            )
        swaps = self._swaps(operation, lambda rank: whole[self.rank], lambda rank: whole[rank])
        return whole, partial(_wait_all, swaps)

    def begin_reduce_scatter(
        self, operation: str, parts: torch.Tensor
    ) -> tuple[torch.Tensor, Callable[[], None]]:
        """Where the sum of this rank's part arrives, and what waits for it; ``parts`` is [size,
        ...] and contiguous, and keeps its values until then."""
        if not self._sends_one_by_one:
            mine = torch.empty_like(parts[0])
            self._count(parts[1:])
            return mine, self._begun(
                operation,
                lambda: reduce_scatter_single(
                    mine.view(-1), parts.view(-1), group=self.wire, async_op=True
                ),
            )
        total = parts[self.rank].clone()
        swaps = self._swaps(
            operation, lambda rank: parts[rank], lambda rank: torch.empty_like(total)
        )
        return total, lambda: _add_all(total, swaps)

    def _begun(self, operation: str, start: Callable[[], Any]) -> Callable[[], None]:
        """Start a collective; what waits for it keeps its tensors."""
        work = self.guarded(operation, "all ranks", start)
        return lambda: self.collective(operation, lambda: (start, work.wait()))

    def _swaps(
        self,
        operation: str,
        sent: Callable[[int], torch.Tensor],
        received: Callable[[int], torch.Tensor],
    ) -> list[Exchange]:
        """One message to and from every other rank, all under way together."""
        found = []
        for distance in range(1, self.size):
            to, source = self.neighbour(distance), self.neighbour(-distance)
            found.append(
                self.exchange(
                    operation, send=sent(to), to=to, receive=received(source), source=source,
                    tag=BESIDE_TAG,
                )
            )  # fmt: skip
        return found

    def reduce_scatter(self, operation: str, parts: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of the part for this rank; ``parts`` is [size, ...]."""
        if self._sends_one_by_one:
            return self._sum_one_by_one(
                operation, parts[self.rank].clone(), lambda rank: parts[rank]
            )
        mine = torch.empty_like(parts[0])
        self._count(parts[1:])
        self.collective(
            operation,
            lambda: reduce_scatter_single(
                mine.view(-1), parts.contiguous().view(-1), group=self.wire
            ),
        )
        return mine

    def all_reduce(self, operation: str, partial: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in place."""
        if self.group is not None:
            self.collective(operation, lambda: self.start_sum(partial))
        return partial

    def largest(self, operation: str, x: torch.Tensor) -> torch.Tensor:
        """The largest of all ranks' elements, in place."""
        if self.group is not None:
            self.collective(operation, lambda: self.start_sum(x, op=dist.ReduceOp.MAX))
        return x

    def all_to_all(self, operation: str, parts: torch.Tensor) -> torch.Tensor:
        """Sends ``parts[r]`` to rank r; the result holds what each rank sent here."""
        received = torch.empty_like(parts, memory_format=torch.contiguous_format)
        if self._sends_one_by_one:
            received[self.rank].copy_(parts[self.rank])
            self._fill(operation, received, lambda rank: parts[rank])
        else:
            self._count(parts[1:])
            self.collective(
                operation,
                lambda: dist.all_to_all_single(received, parts.contiguous(), group=self.wire),
            )
        return received

    # --- the same for parts that are made when they are sent and used when they arrive

    def iter_all_to_all(
        self, operation: str, part: Callable[[int], torch.Tensor]
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Every other rank and what it has for this one; ``part(r)`` is what rank r shall have.

        What is yielded may be overwritten by the next. All parts have one shape.
        """
        if self._sends_one_by_one:
            yield from self._one_by_one(operation, part)
        else:
            yield from self._others(self.all_to_all(operation, self._stacked(part)))

    def iter_all_gather(
        self, operation: str, local: torch.Tensor
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Every other rank and its tensor, which may be overwritten by the next."""
        if self._sends_one_by_one:
            yield from self._one_by_one(operation, lambda rank: local)
        else:
            yield from self._others(self.all_gather(operation, local))

    def reduce_scatter_parts(
        self, operation: str, part: Callable[[int], torch.Tensor]
    ) -> torch.Tensor:
        """The sum over ranks of ``part(this rank)``, which is made anew for each rank."""
        if self._sends_one_by_one:
            return self._sum_one_by_one(operation, part(self.rank), part)
        return self.reduce_scatter(operation, self._stacked(part))

    @property
    def _sends_one_by_one(self) -> bool:
        """Whether collectives are made of messages between two ranks.

        gloo's own take each part twice (an all-gather into a buffer of its own, a reduce-scatter
        as an all-reduce of a copy, so twice the bytes too), and the thread that ran one lets go of
        its tensors some time after it is done.
        """
        return self.group is not None and dist.get_backend(self.group) == dist.Backend.GLOO

    def _one_by_one(
        self, operation: str, part: Callable[[int], torch.Tensor]
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """In each of p - 1 rounds one part leaves and one arrives: no more is held."""
        buffer: torch.Tensor | None = None
        for distance in range(1, self.size):
            buffer = self._swapped(operation, distance, part, buffer)
            yield self.neighbour(-distance), buffer

    def _swapped(
        self,
        operation: str,
        distance: int,
        part: Callable[[int], torch.Tensor],
        receive: torch.Tensor | None,
    ) -> torch.Tensor:
        to, source = self.neighbour(distance), self.neighbour(-distance)
        sent = part(to).contiguous()
        if receive is None:
            receive = torch.empty_like(sent)
        if sent.numel() == 0:
            return receive
        started = self.exchange(operation, send=sent, to=to, receive=receive, source=source)
        return started.wait()

    def _fill(
        self, operation: str, whole: torch.Tensor, part: Callable[[int], torch.Tensor]
    ) -> None:
        """Receives rank r's part into ``whole[r]``."""
        for distance in range(1, self.size):
            self._swapped(operation, distance, part, whole[self.neighbour(-distance)])

    def _sum_one_by_one(
        self, operation: str, total: torch.Tensor, part: Callable[[int], torch.Tensor]
    ) -> torch.Tensor:
        for _, other in self._one_by_one(operation, part):
            total.add_(other)
        return total

    def _stacked(self, part: Callable[[int], torch.Tensor]) -> torch.Tensor:
        first = part(0)
        whole = first.new_empty((self.size, *first.shape))
        for rank in range(self.size):
            whole[rank] = part(rank)
        return whole

    def _others(self, whole: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        return ((rank, whole[rank]) for rank in range(self.size) if rank != self.rank)

    def _count(self, sent: torch.Tensor) -> None:
        found = stats.layer(self.layer)
        found.messages += 1
        found.bytes_sent += sent.numel() * sent.element_size()

    def collective(self, operation: str, call: Callable[[], Any]) -> None:
        others = [str(r) for r in range(self.size) if r != self.rank]
        named = ", ".join(others[:8]) + (", ..." if len(others) > 8 else "")
        with stats.span(stats.layer(self.layer), f"{self.layer}: {operation}", "wait_s"):
            self.guarded(operation, f"ranks {named}", call)

    def guarded(self, operation: str, peers: str, call: Callable[[], T]) -> T:
        """A call that may wait for other ranks.

        Raises
        ------
        CommunicationError
            If they do not come: it says why.
        """
        channel, doing = self.channel, f"{self.layer or 'attention'}: {operation}"
        try:
            with channel.waits(f"{doing}"):
                found = call()
        except RuntimeError as error:
            if is_settled(error):
                raise
            raise settled(self._failed(doing, peers, channel.give_up(error, doing))) from error
        channel.has_met = True
        return found

    def _failed(self, doing: str, peers: str, why: str) -> CommunicationError:
        cure = cure_after(
            why,
            "read the other ranks' output for the first error (one stopped, failed or runs another "
            "program); raise the group's timeout if they are only slow",
        )
        return CommunicationError(
            f"{doing}: rank {self.rank} of {self.size} was waiting for {peers}: {why}{cure}"
        )


@dataclass(frozen=True, eq=False)
class Exchange:
    """A send and a receive on their way."""

    ranks: Ranks
    operation: str
    works: Sequence[Any]
    peers: Sequence[int]
    buffers: tuple[torch.Tensor, torch.Tensor]
    """Kept alive until both have arrived."""

    def wait(self) -> torch.Tensor:
        """The received buffer, once both messages are through."""
        layer = self.ranks.layer
        with stats.span(stats.layer(layer), f"{layer}: {self.operation}", "wait_s"):
            for work, peer in zip(self.works, self.peers, strict=False):
                self.ranks.guarded(self.operation, f"rank {peer}", partial(_finish, work))
        return self.buffers[1]


def _wait_all(swaps: Sequence[Exchange]) -> None:
    for swap in swaps:
        swap.wait()


def _add_all(total: torch.Tensor, swaps: Sequence[Exchange]) -> None:
    for swap in swaps:
        total.add_(swap.wait())


def _finish(work: Any) -> None:
    work.wait()
