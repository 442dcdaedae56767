"""What differs between the releases of torch that ringfx runs on, a line on each difference."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Mapping
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.nn import attention
from torch.utils.checkpoint import SelectiveCheckpointContext

from ringfx.torch_compat.dispatch import disable_current_modes
from ringfx.torch_compat.fake_tensors import unset_fake_temporarily

__all__ = [
    "ISOLATED", "all_gather_single", "asked_by_policy", "clamp_tie", "reduce_scatter_single",
    "restore_flash_attention", "transforms_run",
]  # fmt: skip


def _takes(function: Any, name: str) -> bool:
    return name in inspect.signature(function).parameters


# 2.13 gave both new names; earlier releases know the old ones only, which are deprecated since.
all_gather_single: Any = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter_single: Any = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)

ISOLATED: Mapping[str, Any] = (
    {"isolate_recompiles": True} if _takes(torch.compile, "isolate_recompiles") else {}
)
"""2.13 keeps programs apart by the call of torch.compile that made them; before, all that are made
of one function stand in one list, and planning has to clear it."""

_SHOWS_OUTPUT = _takes(SelectiveCheckpointContext, "op_output")


def asked_by_policy(result: Any) -> SelectiveCheckpointContext:
    """What a policy of selective checkpointing is shown; since 2.13 the operator's result too."""
    shown = {"op_output": result} if _SHOWS_OUTPUT else {}
    return SelectiveCheckpointContext(is_recompute=False, **shown)


@functools.cache
def clamp_tie() -> float:
    """The part of a gradient that ``torch.clamp`` passes on to a number equal to its bound.

    All of it, and since 2.15 none.
    """
    with (
        unset_fake_temporarily(),
        disable_current_modes(),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        at_bound = torch.zeros((), device="cpu", requires_grad=True)
        return float(torch.autograd.grad(at_bound.clamp(min=0.0), at_bound)[0])


def restore_flash_attention() -> None:
    """FlashAttention 2 behind torch's flash operators again; not every release has a way back."""
    restore: Any = getattr(attention, "restore_flash_attention_impl", None)
    if restore is not None:
        restore()


def transforms_run() -> contextlib.AbstractContextManager[object]:
    """Before 2.13 ``torch.vmap`` under pre-dispatch tracing is written down and not carried out,
    also where nothing is exported."""
    return mock.patch("torch._export.utils._maybe_find_pre_dispatch_tf_mode_for_export", _no_mode)


def _no_mode() -> None:
    """Since 2.13 what the function answers where nothing is exported."""
