"""Real ranks of which one fails, stays away or ends; what the others hear, and how soon.

Ranks are forked from a server that has compiled a model before, so they start in little time.
The group's timeout is far longer than anything here may take.
"""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ringfx
from tests.end_to_end.models import plain, tokens

__all__ = ["TIMEOUT_S", "Heard", "run"]

TIMEOUT_S = 400.0
EXIT_S = 30.0
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.end_to_end.warm"])

VICTIM = 1


@dataclass(frozen=True, kw_only=True)
class Heard:
    """What one rank heard: the error's text ("" for none), after how long."""

    rank: int
    text: str = ""
    seconds: float = 0.0
    answered: bool = True
    log: str = ""
    """What it wrote to stderr."""


class Placed(nn.Module):
    """With a table of 64 positions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.places = nn.Embedding(64, 96)
        self.model = plain()()

    def forward(self, ids: torch.Tensor) -> Any:
        shift = self.places(torch.arange(ids.shape[1])).argmax(-1) % 2
        return self.model((ids + shift) % 96)


def optimized(model: nn.Module | None = None, compiler: str = "eager", **options: Any) -> Any:
    return ringfx.optimize(model or plain()(), compiler=compiler, **options)  # type: ignore[arg-type]


def is_victim() -> bool:
    return dist.get_rank() == VICTIM


def beyond(compiler: str) -> None:
    optimized(Placed(), compiler)(tokens(65))


def raises_between_calls(compiler: str) -> None:
    model = optimized(compiler=compiler)
    model(tokens(16)).sum().backward()
    if is_victim():
        raise KeyError("no such batch")
    model(tokens(16))


def raises_before_the_first_call(compiler: str) -> None:
    model = optimized(compiler=compiler)
    if is_victim():
        raise KeyError("no such batch")
    model(tokens(16))


def hook_raises(compiler: str) -> None:
    made = plain()()

    def hook(*_: Any) -> None:
        torch._dynamo.graph_break()
        if is_victim():
            raise ValueError("the hook fails")

    made.blocks[1].register_forward_pre_hook(hook)  # type: ignore[index, union-attr]
    model = optimized(made, compiler)
    model(tokens(16))


def only_one_calls(compiler: str) -> None:
    """The victim goes on to touch what it has."""
    model = optimized(compiler=compiler)
    logits = model(tokens(16))
    if is_victim():
        logits.sum()
    model(tokens(16))


def ends_early(compiler: str) -> None:
    model = optimized(compiler=compiler)
    model(tokens(16))
    if is_victim():
        sys.exit(0)
    model(tokens(16))


def ends_before_the_first_call(compiler: str) -> None:
    model = optimized(compiler=compiler)
    if is_victim():
        sys.exit(0)
    model(tokens(16))


def killed(compiler: str) -> None:
    model = optimized(compiler=compiler)
    model(tokens(16))
    if is_victim():
        os.kill(os.getpid(), signal.SIGKILL)
    model(tokens(16))


def fails_to_compile(compiler: str) -> None:
    if is_victim():
        from ringfx.compile import backend

        def broken(*_: Any) -> Any:
            raise MemoryError("no room to compile")

        backend.compile_local_program = broken  # type: ignore[assignment, attr-defined]
    optimized(compiler=compiler)(tokens(16))


def backward_raises(compiler: str) -> None:
    made: Any = plain()()

    def hook(grad: torch.Tensor) -> None:
        if is_victim():
            raise ArithmeticError("a gradient of the victim's")

    model = optimized(made, compiler)
    loss = model(tokens(16)).square().mean()
    if is_victim():
        loss.register_hook(hook)
    loss.backward()


def backward_raises_and_goes_on(compiler: str) -> None:
    """The victim catches its error and calls the model, where the others are in backward."""
    model = optimized(compiler=compiler)
    loss = model(tokens(16)).square().mean()
    if is_victim():
        model(tokens(16))
    else:
        loss.backward()


def touches_alone(compiler: str) -> None:
    """The victim has gone on to the next call."""
    model = optimized(compiler=compiler)
    logits = model(tokens(16))
    if not is_victim():
        logits.sum()
    model(tokens(16))


def interrupted(compiler: str) -> None:
    made = plain()()

    def hook(*_: Any) -> None:
        torch._dynamo.graph_break()
        if is_victim():
            raise KeyboardInterrupt

    made.blocks[1].register_forward_pre_hook(hook)  # type: ignore[index, union-attr]
    optimized(made, compiler)(tokens(16))


def goes_on_after_an_error(compiler: str) -> None:
    """All meet an error in one call, one rank catches it, and the next call is right."""
    model = optimized(Placed(), compiler)
    for length in (16, 12):
        with pytest.raises((IndexError, ringfx.RingfxError), match="index out of range"):
            model(tokens(65))
        value, expected = model(tokens(length)).sum().item(), Placed()(tokens(length)).sum().item()
        assert abs(value - expected) < 1e-3 * max(1.0, abs(expected))


def goes_on_after_an_error_of_one(compiler: str) -> None:
    """One rank catches an error that it alone meets after its last message."""
    made = plain()()
    fails = [False]

    def hook(*_: Any) -> None:
        torch._dynamo.graph_break()
        if fails[0] and is_victim():
            raise ValueError("the hook fails")

    made.register_forward_hook(hook)
    model = optimized(made, compiler)
    for fails[0] in (False, True, False, True, False):
        with contextlib.suppress(ValueError):
            model(tokens(16))
    assert abs(model(tokens(16)).sum().item() - plain()()(tokens(16)).sum().item()) < 1e-2


def _rank(
    rank: int, size: int, folder: str, case: Callable[[str], None], compiler: str, pipe: Any,
    timeout_s: float, victim: int, store: str,
) -> None:  # fmt: skip
    global VICTIM
    VICTIM = victim
    with open(f"{folder}/stderr{rank}", "w") as log:
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=store.format(folder=folder),
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=timeout_s),
    )
    torch.manual_seed(0)
    dist.barrier()
    start, text = time.monotonic(), ""
    try:
        case(compiler)
    except BaseException as error:
        text = f"{type(error).__name__}: {error}"
        raise  # as a script would
    finally:
        pipe.send((text, time.monotonic() - start))
    with contextlib.suppress(EOFError):
        pipe.recv()  # nobody's end may be another one's error
    os._exit(0)


def run(
    case: Callable[[str], None], *, size: int = 2, compiler: str = "eager",
    timeout_s: float = TIMEOUT_S, victim: int = VICTIM, store: str = "file://{folder}/store",
) -> list[Heard]:  # fmt: skip
    """What each rank heard."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o700)
        ranks = []
        for rank in range(size):
            ours, theirs = _CONTEXT.Pipe()
            arguments = (rank, size, folder, case, compiler, theirs, timeout_s, victim, store)
            process = _CONTEXT.Process(target=_rank, args=arguments)
            process.start()
            theirs.close()
            ranks.append((process, ours))
        for rank, (_process, pipe) in enumerate(ranks):
            if not pipe.poll(timeout_s):
                found.append(Heard(rank=rank, answered=False))
                continue
            try:
                text, seconds = pipe.recv()
            except EOFError:
                text, seconds = "ended without an answer", 0.0
            found.append(Heard(rank=rank, text=text, seconds=seconds))
        for (process, _), heard in zip(ranks, found, strict=True):
            if heard.text:  # it ends by itself, and says why
                process.join(timeout=EXIT_S)
        found = [
            replace(heard, log=Path(f"{folder}/stderr{heard.rank}").read_text()) for heard in found
        ]
        for process, pipe in ranks:
            pipe.close()
            process.kill()
            process.join()
    return found
