"""Checkpoints in code that runs uncompiled: what they run is a program all the same.

``torch.utils.checkpoint`` turns Dynamo off for all that it calls. Where a frame that Dynamo gave up
calls it (a number is read in its loop, or hooks on saved tensors are set), its body would run whole
on every rank. There the call is made from a frame of its own, at which Dynamo starts: the body
becomes a checkpointed region of a program, as it is anywhere else.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from torch.utils.checkpoint import checkpoint

from ringfx.passes.detect.substitute import is_for_ringfx
from ringfx.split_tensor.handoff import users_frame
from ringfx.torch_compat.dynamo import not_started, replace_checkpoint, watching_compiler

__all__ = ["compile_checkpoints"]

log = logging.getLogger("ringfx")

_CALLED: ContextVar[bool] = ContextVar("a checkpoint is called from a frame of its own")


@functools.cache
def compile_checkpoints() -> None:
    """Once in a process: outside calls of optimized models checkpoints are as ever."""
    for function in (_around, _is_ours, is_for_ringfx, watching_compiler):
        not_started(function.__code__)
    replace_checkpoint(_around)


def _around(usual: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A call that no program holds."""
    if not _is_ours():
        return usual(*args, **kwargs)
    if _CALLED.get(False):  # Dynamo has given up that frame
        log.warning(WHOLE, users_frame())
        return usual(*args, **kwargs)
    token = _CALLED.set(True)
    try:
        return _called(args, kwargs)
    finally:
        _CALLED.reset(token)


WHOLE = (
    "%s: Dynamo does not trace what this checkpoint runs, so it runs whole on every rank. Do: see "
    "TORCH_LOGS=graph_breaks for the reason, or call it without a checkpoint."
)


def _is_ours() -> bool:
    """Whether Dynamo is awake, and compiles for ringfx."""
    compiler = watching_compiler()
    return compiler is not None and is_for_ringfx(compiler)


def _called(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The frame."""
    return checkpoint(*args, **kwargs)
