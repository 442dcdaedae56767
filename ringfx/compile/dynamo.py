"""What is asked of Dynamo wherever it traces for ringfx, and nowhere else."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from ringfx.compile.checkpoints import compile_checkpoints
from ringfx.compile.gc_freeze import gc_frozen
from ringfx.errors import RingfxError
from ringfx.passes.capture.logs import defer_logs
from ringfx.passes.detect.substitute import for_ringfx, is_for_ringfx, keep_substituting
from ringfx.torch_compat.dynamo import (
    BackendCompilerFailed,
    CatchErrorsWrapper,
    config,
    kept_as_calls,
    skips,
)
from ringfx.torch_compat.graphs import call_in_frame, call_of, has_hooks
from ringfx.torch_compat.releases import ISOLATED

__all__ = ["compiled", "compiled_call", "for_ringfx", "prepare_tracing"]

NEVER_UNSPLIT: Mapping[str, object] = {
    "recompile_limit": 1024,
    "accumulated_recompile_limit": 4096,
    "fail_on_recompile_limit_hit": True,
    "suppress_errors": False,
    "optimize_ddp": False,
}
"""Dynamo gives a function up after 8 recompilations and runs it as it is: with a new length for
each, the model would run unsplit from the ninth on. Here it compiles on, or says why not; and what
is refused is not run unsplit instead. Inside DistributedDataParallel it would cut the graph by
parameters: here gradients overlap anyway."""

REGIONS_KEPT: Mapping[str, object] = {
    name: False
    for name in ("inline_invoke_subgraph", "inline_single_use_invoke_subgraph")
    if hasattr(config, name)
}
"""2.13 flattens compiled regions before the backend sees them, and visits every body once for each
way down to it: 2^n visits for n checkpoints inside each other. Capture flattens in one walk."""

HOOKS_GUARDED: Mapping[str, object] = {"skip_nnmodule_hook_guards": False}
"""Dynamo looks for hooks when it traces and not again: one that a part is given or loses after the
first call would change nothing, without a word."""


def prepare_tracing() -> None:
    """Before a program is traced: packages replaced by plain torch, log lines deferred."""
    keep_substituting()
    defer_logs(is_for_ringfx)
    compile_checkpoints()
    _keep_compiling()


def compiled_call(
    fn: torch.nn.Module, backend: Any, *, dynamic: bool = False
) -> Callable[..., Any]:
    """A module's call, compiled for ringfx.

    Dynamo starts from the frame of the user's ``forward``. It starts from none in files that it
    skips: a root such as nn.TransformerEncoder is given a frame around it. So is one with hooks,
    which would be programs of their own.
    """
    call: Callable[..., Any] = call_of(fn)
    _keep_hooks_with_modules(fn)
    if skips(fn.forward) or has_hooks(fn):
        call = _framed(fn)
    return compiled(call, backend, dynamic=dynamic)


def compiled(
    function: Callable[..., Any], backend: Any, *, dynamic: bool = False
) -> Callable[..., Any]:
    """A function compiled by a backend of ringfx, beside what the process has compiled of it.

    Others' programs of the same code stay, and their number counts for neither: a function that
    torch.compile gave up after too many recompilations would run unsplit here too.
    """
    prepare_tracing()
    made: Callable[..., Any] = torch.compile(
        function, backend=for_ringfx(backend), dynamic=dynamic, **ISOLATED
    )
    return made


def _keep_hooks_with_modules(model: torch.nn.Module) -> None:
    """What uncompiled code calls of a model is one program with its hooks, not three.

    Hooks of tensor parallelism make DTensors of what they are given, and plain tensors of what the
    module gives; a program of ``forward`` alone would end in parts of a value. fully_shard's break
    the graph, so they stay apart.
    """
    for module in model.modules():
        if module is not model and has_hooks(module) and not isinstance(module, FSDPModule):
            call_in_frame(module, _framed(call_of(module)))


def _framed(fn: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    # Programs are kept with the code object, which all functions made here would share.
    run.__code__ = run.__code__.replace(co_varnames=run.__code__.co_varnames)
    return run


@contextlib.contextmanager
def _unwrapped() -> Iterator[None]:
    """Errors of ringfx leave Dynamo as they are, not inside one that speaks of the backend."""
    try:
        yield
    except BackendCompilerFailed as failure:
        error = failure.inner_exception
        if isinstance(error, RingfxError):
            raise error from error.__cause__
        raise


def _keep_compiling() -> None:
    """Every frame that is compiled for ringfx is compiled under the settings above.

    Where the user calls ``torch.compile(model, backend="ringfx")`` no call of ours stands around
    the model's, so it is asked where Dynamo takes the frame.
    """
    usual = CatchErrorsWrapper.__call__
    if hasattr(usual, "ringfx"):
        return

    @functools.wraps(usual)
    def convert(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_for_ringfx(self):
            return usual(self, *args, **kwargs)
        with (
            config.patch({**NEVER_UNSPLIT, **REGIONS_KEPT, **HOOKS_GUARDED}),
            kept_as_calls(torch.Tensor.unflatten),
            _unwrapped(),
            gc_frozen(),
        ):
            made = usual(self, *args, **kwargs)
            if made.guarded_code is not None:
                # Errors that the model's code has caught while it was traced hold all frames that
                # called it, and so the results of this first call, in reference cycles.
                gc.collect()
            return made

    convert.ringfx = True  # type: ignore[attr-defined]
    CatchErrorsWrapper.__call__ = convert  # type: ignore[method-assign]
