"""The fused kernels of an NVIDIA GPU, and which one is taken.

All return the natural logarithm of the softmax's sum. A table row says where a kernel is admitted;
the first row that admits wins. Pieces that need a mask go to the efficient kernel.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ringfx.errors import RingfxError
from ringfx.ops.kernels.cuda import cudnn, flash, xformers
from ringfx.ops.kernels.cuda.efficient import EFFICIENT
from ringfx.ops.kernels.kernel import GATHERED_KERNELS, MATH, Kernel

__all__ = ["KERNEL_VARIABLE", "choose"]

KERNEL_VARIABLE = "RINGFX_CUDA_KERNEL"
"""Environment variable that names the kernel to take, such as ``cuda_cudnn``."""

HALVES = frozenset({torch.float16, torch.bfloat16})
SINGLES = HALVES | {torch.float32}


@dataclass(frozen=True, kw_only=True)
class Row:
    kernel: Kernel
    dtypes: frozenset[torch.dtype]
    admitted: Callable[[torch.device], bool] = lambda device: True
    prepare: Callable[[], None] = lambda: None
    on_request: bool = False
    """Only where it is named."""


ROWS = (
    Row(
        kernel=xformers.XFORMERS,
        dtypes=SINGLES,
        admitted=lambda device: xformers.has_xformers(),
    ),
    Row(kernel=cudnn.CUDNN, dtypes=HALVES, on_request=True),
    Row(
        kernel=flash.FLASH3,
        dtypes=HALVES,
        admitted=flash.has_flash3,
        prepare=flash.activate_flash3,
    ),
    Row(kernel=flash.FLASH, dtypes=HALVES),
    Row(kernel=EFFICIENT, dtypes=SINGLES),
    Row(kernel=MATH, dtypes=SINGLES | {torch.float64}),
)


def choose(device: torch.device, dtype: torch.dtype, *, gathered: bool = False) -> Kernel:
    """The first kernel of the table that this device and dtype admit.

    Parameters
    ----------
    gathered
        Whether the call meets all keys at once, as in the collective strategy.

    Raises
    ------
    RingfxError
        When ``RINGFX_CUDA_KERNEL`` names a kernel that is unknown or cannot run here.
    """
    asked = os.environ.get(KERNEL_VARIABLE)
    rows = [row for row in ROWS if dtype in row.dtypes and row.admitted(device)]
    if asked and dtype in SINGLES:
        rows = [_named(asked, rows, device, dtype)]
    else:
        barred = frozenset() if gathered else GATHERED_KERNELS
        rows = [row for row in rows if not row.on_request and row.kernel.name not in barred]
    rows[0].prepare()
    return rows[0].kernel


def _named(name: str, rows: list[Row], device: torch.device, dtype: torch.dtype) -> Row:
    for row in rows:
        if row.kernel.name == name:
            return row
    able = ", ".join(row.kernel.name for row in rows)
    raise RingfxError(
        f"{KERNEL_VARIABLE}={name}: no such kernel for {dtype} on {device}. Do: name one of {able},"
        " or unset the variable."
    )
