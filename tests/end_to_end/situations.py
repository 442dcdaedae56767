"""A training script in which one rank ends, stays away or does something else, in every phase of it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset

from tests.end_to_end.faults import is_victim, optimized
from tests.end_to_end.models import plain, tokens

STEPS = 4
AT = 1
"""The step in which it happens."""


# --- what happens


def raises_key_error() -> None:
    raise KeyError("no such batch")


def raises_out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def looks_beyond_a_table() -> None:
    torch.nn.functional.embedding(torch.tensor([9]), torch.zeros(3, 2))


def exits() -> None:
    sys.exit(0)


def exits_with_code() -> None:
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


def leaves_the_group() -> None:
    dist.destroy_process_group()
    sys.exit(0)


def sleeps() -> None:
    """Alive, and never comes: in code that nobody knows."""
    time.sleep(1000)


# --- in which phase


class Batches(Dataset[torch.Tensor]):
    def __init__(self, cause: Callable[[], None]) -> None:
        self.cause = cause if is_victim() else None

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == AT and self.cause:
            self.cause()
        return tokens(16, seed=index)[0]


@dataclass
class Script:
    phase: str
    cause: Callable[[], None]
    caught: bool = False
    """The victim goes on with its next step."""

    def __call__(self, compiler: str) -> None:
        self.at("before the first call")
        model = optimized(self.made(), compiler)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        if self.phase == "compiling" and is_victim():
            from ringfx import backend

            backend.hand_over = lambda *_: self.cause()  # type: ignore[assignment]
        workers = 1 if self.phase == "loader with a worker" else 0
        cause = self.cause if self.phase.startswith("loader") else lambda: None
        for step, batch in enumerate(DataLoader(Batches(cause), batch_size=1, num_workers=workers)):
            self.here = step == AT
            if self.caught and is_victim():
                with contextlib.suppress(Exception):
                    self.step(model, optimizer, batch)
            else:
                self.step(model, optimizer, batch)
        
    def made(self) -> nn.Module:
        made: Any = plain()()
        self.here = False

        def hook(*_: Any) -> None:
            torch._dynamo.graph_break()
            self.at("forward")

        def first(*_: Any) -> None:
            torch._dynamo.graph_break()
            self.at("early in forward")

        if self.phase == "forward":
            made.blocks[1].register_forward_pre_hook(hook)
        if self.phase == "early in forward":
            made.blocks[0].register_forward_pre_hook(first)
        return made

    def at(self, phase: str) -> None:
        if phase == self.phase and is_victim() and getattr(self, "here", True):
            self.cause()

    def step(self, model: Any, optimizer: Any, batch: torch.Tensor) -> None:
        self.at("between calls")
        logits = model(batch)
        self.at("after forward")
        logits.register_hook(lambda grad: self.at("backward"))
        loss = logits.square().mean()
        self.at("before backward")
        loss.backward()
        self.at("in the optimizer")
        if self.phase == "barrier" and self.here and is_victim():
            self.cause()
        if self.phase == "barrier" and self.here:
            dist.barrier()
        optimizer.step()
        optimizer.zero_grad()

PHASES = ["before the first call", "compiling", "early in forward", "forward", "after forward", "before backward", "backward", "in the optimizer", "between calls", "loader", "loader with a worker", "barrier"]
CAUSES = [raises_key_error, raises_out_of_memory, looks_beyond_a_table, exits, exits_with_code, ends_at_once, is_killed, is_terminated, is_interrupted, leaves_the_group]


# --- ranks that live, and do not do the same


def start(compiler: str, **options: Any) -> tuple[Any, Any]:
    model = optimized(compiler=compiler, **options)
    return model, torch.optim.SGD(model.parameters(), lr=0.01)


def step(model: Any, optimizer: Any, seed: int = 0, length: int = 16) -> None:
    model(tokens(length, seed=seed)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def calls_twice(compiler: str) -> None:
    model, optimizer = start(compiler)
    step(model, optimizer)
    model(tokens(16))
    if is_victim():
        model(tokens(16, seed=1))
    step(model, optimizer, 2)


def calls_twice_and_others_wait_in_backward(compiler: str) -> None:
    model, optimizer = start(compiler)
    step(model, optimizer)
    loss = model(tokens(16)).square().mean()
    if is_victim():
        model(tokens(16, seed=1))
    loss.backward()


def skips_a_backward(compiler: str) -> None:
    model, optimizer = start(compiler)
    step(model, optimizer)
    loss = model(tokens(16)).square().mean()
    if not is_victim():
        loss.backward()
    step(model, optimizer)


def catches_in_backward(compiler: str) -> None:
    model, optimizer = start(compiler)
    for here in (False, True, False):
        loss = model(tokens(16)).square().mean()

        def hook(grad: torch.Tensor, here: bool = here) -> None:
            if is_victim() and here:
                raise ArithmeticError("a gradient of the victim's")

        loss.register_hook(hook)
        with contextlib.suppress(ArithmeticError):
            loss.backward()


def catches_within_backward(compiler: str) -> None:
    """After the first messages of backward."""
    made: Any = plain()()
    model = optimized(made, compiler)
    here = [False]

    def hook(grad: torch.Tensor) -> None:
        if is_victim() and here[0]:
            raise ArithmeticError("a gradient of the victim's")

    made.embed.weight.register_hook(hook) if hasattr(made, "embed") else next(made.parameters()).register_hook(hook)
    for here[0] in (False, True, False):
        with contextlib.suppress(ArithmeticError):
            model(tokens(16)).square().mean().backward()


def evaluates_alone(compiler: str) -> None:
    """As in ``if rank == 0: evaluate(model)``, before the next step."""
    model, optimizer = start(compiler)
    step(model, optimizer)
    if is_victim():
        with torch.no_grad():
            model(tokens(16, seed=5))
    step(model, optimizer, 2)


def evaluates_alone_before_a_barrier(compiler: str) -> None:
    model, optimizer = start(compiler)
    step(model, optimizer)
    if is_victim():
        with torch.no_grad():
            model(tokens(16, seed=5))
    dist.barrier()


def calls_alone_at_first_before_a_barrier(compiler: str) -> None:
    model = optimized(compiler=compiler)
    if is_victim():
        model(tokens(16, seed=5))
    dist.barrier()


def calls_alone_and_others_have_ended(compiler: str) -> None:
    model, optimizer = start(compiler)
    step(model, optimizer)
    if is_victim():
        model(tokens(16, seed=5))
    else:
        sys.exit(0)


def other_length(compiler: str) -> None:
    model, optimizer = start(compiler)
    step(model, optimizer)
    step(model, optimizer, length=24 if is_victim() else 16)


def other_batch_at_first(compiler: str) -> None:
    model, optimizer = start(compiler)
    model(tokens(16, batch=3 if is_victim() else 2))


def other_dtype(compiler: str) -> None:
    made = plain()()
    made = made.double() if is_victim() else made
    step(optimized(made, compiler), torch.optim.SGD(made.parameters(), lr=0.1))


def other_mode(compiler: str) -> None:
    model, optimizer = start(compiler)
    step(model, optimizer)
    model.train(not is_victim())
    step(model, optimizer)


def without_grad(compiler: str) -> None:
    model, optimizer = start(compiler)
    step(model, optimizer)
    with torch.set_grad_enabled(not is_victim()):
        model(tokens(16))


def frozen(compiler: str) -> None:
    model, optimizer = start(compiler)
    step(model, optimizer)
    next(model.parameters()).requires_grad_(not is_victim())
    step(model, optimizer)


def other_order(compiler: str) -> None:
    """Two models of the same shapes."""
    torch.manual_seed(0)
    first, second = plain()(), plain()()
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(1.5)
    both = [optimized(first, compiler), optimized(second, compiler)]
    for model in reversed(both) if is_victim() else both:
        model(tokens(16))


def another_model_first(compiler: str) -> None:
    model, optimizer = start(compiler)
    step(model, optimizer)
    if is_victim():
        other, _ = start(compiler)
        other(tokens(24))
    step(model, optimizer)


def only_backward(compiler: str) -> None:
    """The victim leaves a call out and does the backward of an older one."""
    model, optimizer = start(compiler)
    old = model(tokens(16)).square().mean()
    if not is_victim():
        model(tokens(16, seed=1)).square().mean().backward()
    else:
        old.backward()


def logs_alone(compiler: str) -> None:
    model, optimizer = start(compiler)
    logits = model(tokens(16))
    if is_victim():
        str(logits)
    logits.square().mean().backward()


def saves_an_output_alone(compiler: str) -> None:
    import io

    model, optimizer = start(compiler)
    logits = model(tokens(16))
    if is_victim():
        torch.save(logits, io.BytesIO())
    dist.barrier()


def saves_alone(compiler: str) -> None:
    """Parameters are whole on each rank: no error."""
    import io

    model, optimizer = start(compiler)
    step(model, optimizer)
    if is_victim():
        torch.save(model.state_dict(), io.BytesIO())
    dist.barrier()
    step(model, optimizer)


def generates_alone(compiler: str) -> None:
    from tests.end_to_end.models import llama

    model: Any = optimized(llama()(), compiler)
    model(tokens(16))
    if is_victim():
        model.generate(tokens(16), max_new_tokens=3, do_sample=False)
    dist.barrier()


def never_comes(compiler: str) -> None:
    model, optimizer = start(compiler)
    step(model, optimizer)
    if is_victim():
        time.sleep(1000)
    step(model, optimizer)


def waits_at_a_barrier_for_who_raised(compiler: str) -> None:
    """And lives on."""
    model, optimizer = start(compiler)
    step(model, optimizer)
    if is_victim():
        try:
            with contextlib.suppress(ZeroDivisionError):
                made = plain()()
                made.register_forward_pre_hook(lambda *_: 1 // 0)
                optimized(made, compiler)(tokens(16))
        finally:
            time.sleep(5)
        return
    dist.barrier()


APART = [v for k, v in dict(globals()).items() if callable(v) and getattr(v, "__annotations__", {}).get("compiler") and k not in ("start",)]
