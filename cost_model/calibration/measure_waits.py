"""Time steps of the small model with messages between its operators, and without.

What they take more than the messages alone is what ranks wait for each other, and for cores that
compute (``step_time/waits.py``).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ringfx.comm.process_group import Ranks
from ringfx.cost_model.calibration.measure import Effort, synchronise
from ringfx.cost_model.calibration.measure_step import SmallModel, given_tokens
from ringfx.cost_model.prediction.profile import Profile
from ringfx.cost_model.prediction.profile_rows import Operation
from ringfx.cost_model.prediction.terms import message_seconds

__all__ = ["StepWithMessages", "fit_wait_us", "steps_with_messages"]

SUMMED_BYTES = 2**20
"""From here on a parameter's gradient is summed over the ranks, in a message of its own."""
WARM_UP = 2
Message: TypeAlias = tuple[Operation, int]
"""Operation and received bytes."""


@dataclass(frozen=True, kw_only=True)
class StepWithMessages:
    """One way to send within a step."""

    more_ms: float
    """What the step takes more than without messages."""
    messages: tuple[Message, ...]


def steps_with_messages(ranks: Ranks, device: str, effort: Effort) -> tuple[StepWithMessages, ...]:
    """Steps whose layers hand values to the next rank, and such that sum gradients as well.

    All ways take turns, so that a machine that slows down slows all of them.
    """
    model = _Sending(SmallModel(device).to(device), ranks)
    tokens = given_tokens(max(1, effort.operator_tokens // 8), device)
    ways: Sequence[frozenset[Operation]] = [
        frozenset(), frozenset({"send_recv"}), frozenset({"send_recv", "all_reduce"}),
    ]  # fmt: skip
    rounds = [
        [model.step(way, tokens, device) for way in ways]
        for _ in range(WARM_UP + 2 * max(2, effort.min_repeats))
    ]
    bare, *others = (zip(*way, strict=True) for way in zip(*rounds[WARM_UP:], strict=True))
    bare_ms = statistics.median(next(bare))
    return tuple(
        StepWithMessages(more_ms=statistics.median(times) - bare_ms, messages=messages[0])
        for times, messages in others
    )


class _Sending:
    """The model, with messages where its hooks find them asked for."""

    def __init__(self, model: SmallModel, ranks: Ranks) -> None:
        self.model, self.ranks = model, ranks
        self.asked: Collection[Operation] = ()
        self.sent: list[Message] = []
        for layer in model.back:
            layer.register_forward_pre_hook(self._hand_on)
        for parameter in model.parameters():
            if parameter.numel() * parameter.element_size() >= SUMMED_BYTES:
                parameter.register_post_accumulate_grad_hook(self._sum)

    def step(
        self, asked: Collection[Operation], tokens: Tensor, device: str
    ) -> tuple[float, tuple[Message, ...]]:
        """Milliseconds of forward and backward, and what was sent."""
        self.asked, self.sent = asked, []
        dist.barrier()
        synchronise(device)
        start = time.perf_counter()
        self.model(tokens, tokens).backward()
        synchronise(device)
        took_ms = 1e3 * (time.perf_counter() - start)
        self.model.zero_grad()
        return took_ms, tuple(self.sent)

    def exchange(self, x: Tensor) -> None:
        send, received = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        to, source = self.ranks.neighbour(1), self.ranks.neighbour(-1)
        self.ranks.exchange(
            "calibration: within a step", send=send, to=to, receive=received, source=source
        ).wait()
        self.sent.append(("send_recv", send.numel() * send.element_size()))

    def _hand_on(self, layer: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        if "send_recv" not in self.asked:
            return None
        return (_HandedOn.apply(args[0], self),)  # type: ignore[no-untyped-call]

    def _sum(self, parameter: Tensor) -> None:
        if "all_reduce" in self.asked and parameter.grad is not None:
            self.ranks.all_reduce("calibration: gradients within a step", parameter.grad)
            self.sent.append(("all_reduce", parameter.numel() * parameter.element_size()))


class _HandedOn(torch.autograd.Function):
    """The identity; forward and backward send what passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sending: _Sending) -> Tensor:
        ctx.sending = sending
        sending.exchange(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.sending.exchange(grads[0])
        return grads[0], None


def fit_wait_us(steps: Sequence[StepWithMessages], world_size: int, profile: Profile) -> float:
    """What each message waits, by least squares over the ways to send; not below 0."""
    counts = [len(step.messages) for step in steps]
    beyond_ms = [
        step.more_ms
        - 1e3
        * sum(message_seconds(profile, what, world_size, size) for what, size in step.messages)
        for step in steps
    ]
    squares = sum(count**2 for count in counts)
    found_ms = (
        sum(a * b for a, b in zip(counts, beyond_ms, strict=True)) / squares if squares else 0.0
    )
    return round(max(0.0, 1e3 * found_ms), 1)
