"""Which messages this rank sends, in the order in which it starts and ends them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from ringfx.comm import process_group

__all__ = ["Message", "recorded"]


class Message(str):
    """``all_reduce``, ``hop``, ...; ``begin_sum`` and ``finish_sum`` are its two halves."""

    num_bytes: int


@contextlib.contextmanager
def recorded() -> Iterator[list[Message]]:
    """The messages sent inside, without those that only compare inputs."""
    found: list[Message] = []

    def note(name: str, sent: Any) -> None:
        message = Message(name)
        message.num_bytes = _bytes(sent)
        found.append(message)

    inside: list[str] = []

    def noting(name: str, function: Callable[..., Any], position: int = 0) -> Callable[..., Any]:
        """Counted, unless it is how another message is carried out."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if not inside:
                note("begin_sum" if kwargs.get("async_op") else name, args[position])
            return function(*args, **kwargs)

        return call

    def carrying(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: process_group.Ranks, operation: str, sent: torch.Tensor) -> Any:
            note(name, sent)
            inside.append(name)
            try:
                return function(self, operation, sent)
            finally:
                inside.pop()

        return call

    def waiting(self: Any, operation: str, call: Any) -> None:
        if "gradients of" in operation:
            note("finish_sum", None)
        collective(self, operation, call)

    collective = process_group.Ranks.collective
    with contextlib.ExitStack() as stack:
        for attribute, name in (
            ("all_reduce", "all_reduce"),
            ("broadcast", "broadcast"),
        ):
            replacement = noting(name, getattr(dist, attribute))
            stack.enter_context(mock.patch.object(dist, attribute, replacement))
        hops = noting("hop", process_group.Ranks.start, 1)
        stack.enter_context(mock.patch.object(process_group.Ranks, "start", hops))
        for name in ("all_gather", "reduce_scatter", "all_to_all"):
            replacement = carrying(name, getattr(process_group.Ranks, name))
            stack.enter_context(mock.patch.object(process_group.Ranks, name, replacement))
        stack.enter_context(mock.patch.object(process_group.Ranks, "collective", waiting))
        yield found


def _bytes(sent: Any) -> int:
    if isinstance(sent, list):  # batched sends and receives
        return sum(_bytes(one.buffer) for one in sent if one.sends)
    return sent.numel() * sent.element_size() if isinstance(sent, torch.Tensor) else 0
