"""What happens in training scripts: one rank ends, in any phase, or does something else."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset

from tests.end_to_end.faults import is_victim, optimized
from tests.end_to_end.models import llama, plain, tokens

# --- what ends a rank


def raises() -> None:
    raise KeyError("no such batch")


def runs_out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def looks_beyond_a_table() -> None:
    nn.functional.embedding(torch.tensor([9]), torch.zeros(3, 2))


def exits() -> None:
    sys.exit(0)


def exits_with_a_code() -> None:
    sys.exit(3)


def ends_at_once() -> None:
    os._exit(1)


def is_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def is_terminated() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


def is_interrupted() -> None:
    raise KeyboardInterrupt


def leaves_its_group() -> None:
    dist.destroy_process_group()
    sys.exit(0)


# --- when

STEPS, AT = 3, 1
"""Steps of the script, and the one in which it happens."""


class Batches(Dataset[torch.Tensor]):
    def __init__(self, at: Callable[[str, int], None]) -> None:
        self.at = at

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, index: int) -> torch.Tensor:
        self.at("the loader", index)
        self.at("a worker of the loader", index)
        return tokens(16, seed=index)[0]


@dataclass
class Script:
    """Trains for a few steps; the victim meets the cause in that phase."""

    phase: str
    cause: Callable[[], None]
    step: int = 0
    is_victim: bool = False
    """For a worker of the loader, which is no rank."""

    def at(self, phase: str, step: int = AT) -> None:
        if phase == self.phase and step == AT and self.is_victim:
            self.cause()

    def in_step(self, phase: str) -> None:
        self.at(phase, self.step)

    def __call__(self, compiler: str) -> None:
        self.is_victim = is_victim()
        self.at("before optimize")
        model = optimized(self.made(), compiler)
        self.at("before the first call")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        self.compiles()
        for step, batch in enumerate(self.batches()):
            self.step = step
            self.train(model, optimizer, batch)

    def compiles(self) -> None:
        if self.phase == "compilation" and is_victim():
            from ringfx.compile import backend

            backend.compile_local_program = lambda *_: self.cause()  # type: ignore[assignment, attr-defined, misc, return-value]

    def batches(self) -> Iterable[torch.Tensor]:
        workers = int("worker" in self.phase)
        return DataLoader(Batches(self.at), batch_size=1, num_workers=workers)

    def made(self) -> nn.Module:
        made: Any = plain()()
        blocks = {"the first block": 0, "the second block": 1}
        if self.phase in blocks:
            made.blocks[blocks[self.phase]].register_forward_pre_hook(self.in_a_block)
        return made  # type: ignore[no-any-return]

    def in_a_block(self, *_: Any) -> None:
        torch._dynamo.graph_break()
        self.in_step(self.phase)

    def train(self, model: Any, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> None:
        self.in_step("between calls")
        self.in_step("between calls, beside a worker")
        logits = model(batch)
        self.in_step("after forward")
        logits.register_hook(lambda grad: self.in_step("backward"))
        logits.square().mean().backward()
        self.in_step("before the optimizer")
        if self.phase == "before a barrier" and self.step == AT:
            self.in_step("before a barrier")
            dist.barrier()
        optimizer.step()
        optimizer.zero_grad()


# --- ranks that live on, and do not do the same


def start(compiler: str) -> tuple[Any, torch.optim.Optimizer]:
    """After a step that all make."""
    model = optimized(compiler=compiler)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    step(model, optimizer)
    return model, optimizer


def step(model: Any, optimizer: torch.optim.Optimizer, seed: int = 0, length: int = 16) -> None:
    model(tokens(length, seed=seed)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def calls_twice(compiler: str) -> None:
    model, optimizer = start(compiler)
    if is_victim():
        model(tokens(16, seed=1))
    step(model, optimizer)


def calls_twice_while_others_are_in_backward(compiler: str) -> None:
    model, _ = start(compiler)
    loss = model(tokens(16)).square().mean()
    if is_victim():
        model(tokens(16, seed=1))
    loss.backward()


def skips_a_backward(compiler: str) -> None:
    model, optimizer = start(compiler)
    loss = model(tokens(16)).square().mean()
    if not is_victim():
        loss.backward()
    step(model, optimizer)


def only_does_backward(compiler: str) -> None:
    """Of an older call, while others make a new one."""
    model, _ = start(compiler)
    old = model(tokens(16)).square().mean()
    if not is_victim():
        model(tokens(16, seed=1))
    old.backward()


def catches_in_backward(compiler: str) -> None:
    """And goes on with the next call."""
    model, _ = start(compiler)
    for here in (True, False):
        loss = model(tokens(16)).square().mean()
        if here and is_victim():
            loss.register_hook(lambda grad: raises())
        with contextlib.suppress(KeyError):
            loss.backward()


def catches_at_the_end_of_backward(compiler: str) -> None:
    model, _ = start(compiler)
    for here in (True, False):
        handle = model.embed.weight.register_hook(
            lambda grad, here=here: raises() if here and is_victim() else None
        )
        with contextlib.suppress(KeyError):
            model(tokens(16)).square().mean().backward()
        handle.remove()


def catches_in_backward_before_a_barrier(compiler: str) -> None:
    model, _ = start(compiler)
    loss = model(tokens(16)).square().mean()
    if is_victim():
        loss.register_hook(lambda grad: raises())
    with contextlib.suppress(KeyError):
        loss.backward()
    dist.barrier()


def evaluates_alone(compiler: str) -> None:
    """As in ``if rank == 0: evaluate(model)``, before the next step."""
    model, optimizer = start(compiler)
    if is_victim():
        with torch.no_grad():
            model(tokens(16))
    step(model, optimizer)


def evaluates_alone_before_a_barrier(compiler: str) -> None:
    model, _ = start(compiler)
    if is_victim():
        with torch.no_grad():
            model(tokens(16, seed=5))
    dist.barrier()


def makes_the_first_call_alone_before_a_barrier(compiler: str) -> None:
    model = optimized(compiler=compiler)
    if is_victim():
        model(tokens(16))
    dist.barrier()


def calls_while_others_have_ended(compiler: str) -> None:
    model, _ = start(compiler)
    if not is_victim():
        sys.exit(0)
    model(tokens(16))


def generates_alone(compiler: str) -> None:
    model: Any = optimized(llama()(), compiler)
    model(tokens(16))
    if is_victim():
        model.generate(tokens(16), max_new_tokens=3, do_sample=False)
    dist.barrier()


def saves_an_output_alone(compiler: str) -> None:
    model, _ = start(compiler)
    logits = model(tokens(16))
    if is_victim():
        torch.save(logits, io.BytesIO())
    dist.barrier()


def logs_an_output_alone(compiler: str) -> None:
    model, _ = start(compiler)
    logits = model(tokens(16))
    if is_victim():
        str(logits)
    logits.square().mean().backward()


def gives_another_length(compiler: str) -> None:
    model, optimizer = start(compiler)
    step(model, optimizer, length=24 if is_victim() else 16)


def gives_another_batch_at_first(compiler: str) -> None:
    optimized(compiler=compiler)(tokens(16, batch=3 if is_victim() else 2))


def has_another_type(compiler: str) -> None:
    made = plain()()
    optimized(made.double() if is_victim() else made, compiler)(tokens(16))


class Louder(nn.Module):
    """In training, so that the mode changes the program."""

    def __init__(self) -> None:
        super().__init__()
        self.model = plain()()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(ids)
        return 2 * logits if self.training else logits


def is_in_another_mode(compiler: str) -> None:
    model = optimized(Louder(), compiler)
    model(tokens(16))
    model.train(not is_victim())
    model(tokens(16))


class Scaled(Louder):
    """With a parameter that one rank does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(96))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(ids)
        return logits if is_victim() else logits * self.scale


def leaves_a_parameter_out(compiler: str) -> None:
    optimized(Scaled(), compiler)(tokens(16))


def keeps_no_gradients(compiler: str) -> None:
    model, _ = start(compiler)
    with torch.set_grad_enabled(not is_victim()):
        model(tokens(16))


def has_frozen_a_parameter(compiler: str) -> None:
    model, optimizer = start(compiler)
    model.embed.weight.requires_grad_(not is_victim())
    step(model, optimizer)


def calls_two_models_in_another_order(compiler: str) -> None:
    first, second = plain()(), plain()()
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(1.5)
    both = [optimized(first, compiler), optimized(second, compiler)]
    for model in reversed(both) if is_victim() else both:
        model(tokens(16))


def calls_another_model_first(compiler: str) -> None:
    model, optimizer = start(compiler)
    if is_victim():
        optimized(compiler=compiler)(tokens(24))
    step(model, optimizer)


def saves_alone(compiler: str) -> None:
    """Parameters are whole on each rank: nothing to hear."""
    model, optimizer = start(compiler)
    if is_victim():
        torch.save(model.state_dict(), io.BytesIO())
    dist.barrier()
    step(model, optimizer)


def fails_and_lives_while_others_are_at_a_barrier(compiler: str) -> None:
    """Nothing can end a rank in a message of the user's own: it is told in its log."""
    made = plain()()

    def hook(*_: Any) -> None:
        torch._dynamo.graph_break()
        if is_victim():
            raises()

    made.register_forward_hook(hook)  # after the last message
    with contextlib.suppress(KeyError):
        optimized(made, compiler)(tokens(16))
    if is_victim():
        time.sleep(5)
    dist.barrier()
