"""Autograd: hooks, the running backward, what a tensor's memory and version are.

Each name says what it is needed for and, after "Without", what a release that drops it breaks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

__all__ = [
    "ENTER_AUTOCAST", "EXIT_AUTOCAST", "SET_GRAD_ENABLED", "after_backward", "autocast_is_enabled",
    "backward_in", "in_backward", "in_transform", "is_scripted", "make_wrapper", "profiler_is_on",
    "storage_id",
    "version_of", "without_saved_tensor_hooks",
]  # fmt: skip

SET_GRAD_ENABLED = torch._C._set_grad_enabled
"""The call that ``no_grad`` leaves in a program. Without: regions without gradients."""

ENTER_AUTOCAST = torch.amp.autocast_mode._enter_autocast
"""The call that ``with autocast`` leaves in a program. Without: autocast inside models."""

EXIT_AUTOCAST = torch.amp.autocast_mode._exit_autocast
"""The end of it."""


def autocast_is_enabled(context: torch.autocast) -> bool:
    """Whether this ``torch.autocast`` would cast; it looks at what the device supports.

    Without: autocast inside models.
    """
    return bool(context._enabled)


@contextlib.contextmanager
def without_saved_tensor_hooks() -> Iterator[None]:
    """What tracing saves for backward is no business of a checkpoint, or of offloading, around it.

    A checkpoint counts what its body saves; torch.func refuses to run where there are hooks.
    Without: optimized models inside checkpoints and ``save_on_cpu``.
    """
    hooks = torch._C._autograd
    popped: list[tuple[Any, Any]] = []
    while (top := hooks._top_saved_tensors_default_hooks(True)) is not None:
        popped.append(top)
        hooks._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(popped):
            hooks._push_saved_tensors_default_hooks(pack, unpack)


@contextlib.contextmanager
def backward_in(mode: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
    """A backward that starts here runs in this mode of torch functions, checkpoints' code too.

    A mode is off while it handles the call that starts a backward. Without: what checkpointed
    models round to float32 is a difference for ``ringfx.verify``.
    """
    package: Any = torch.autograd
    stock = package._engine_run_backward

    def run(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return stock(*args, **kwargs)

    package._engine_run_backward = run
    try:
        yield
    finally:
        package._engine_run_backward = stock


def after_backward(function: Callable[[], None]) -> None:
    """Called when the backward that runs now is done. Without: counting accumulated gradients."""
    torch.autograd.Variable._execution_engine.queue_callback(function)


def in_backward() -> bool:
    """Whether this thread runs a backward. Without: telling a touch in backward from others."""
    return bool(torch._C._current_graph_task_id() != -1)


def in_transform() -> bool:
    """Whether a transform of torch.func is at work. Without: running whole under grad and vmap."""
    return bool(torch._C._functorch.get_dynamic_layer_stack_depth() > 0)


def is_scripted() -> bool:
    """Whether torch.jit.trace is at work. Without: naming it where a call ran unsplit."""
    return torch._C._get_tracing_state() is not None


def profiler_is_on() -> bool:
    """Whether torch.profiler records. Without: ranges in profiles, or their cost in each call."""
    return bool(torch.autograd.profiler._is_profiler_enabled)


def version_of(tensor: torch.Tensor) -> int:
    """How often the tensor was written. Without: noticing writes into split values and grads."""
    return int(tensor._version)


def storage_id(tensor: torch.Tensor) -> int:
    """Equal for tensors of one memory, fake ones too. Without: writes through views."""
    return int(tensor.untyped_storage()._cdata)


def make_wrapper(cls: type, shape: Any, **options: Any) -> Any:
    """A tensor of a subclass without memory of its own. Without: split tensors."""
    return torch.Tensor._make_wrapper_subclass(cls, shape, **options)  # type: ignore[attr-defined]
