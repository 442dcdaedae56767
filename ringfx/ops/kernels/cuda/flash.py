"""FlashAttention as torch calls it: version 2 built in, version 3 where its package is installed.

torch's ``activate_flash_attention_impl`` puts version 3 behind the same two operators, so nothing
but the name changes here.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch.nn import attention

from ringfx.ops.kernels.cuda.efficient import Maskless

__all__ = ["FLASH", "FLASH3", "activate_flash3", "has_flash3"]

aten = torch.ops.aten
Tensor = torch.Tensor

LARGEST_HEAD_DIM = 256


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    found = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return found[0], found[1]


def _differentiate(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse_BHQ: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    none = torch.empty(0, dtype=torch.int64, device=q.device)
    random = torch.zeros(2, dtype=torch.uint64, device=q.device)
    dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(
        dout,
        q,
        k,
        v,
        out,
        lse_BHQ,
        none,
        none,
        q.shape[2],
        k.shape[2],
        0.0,
        causal,
        random,
        none,
        scale=scale,
    )
    return dq, dk, dv


def has_flash3(device: torch.device) -> bool:
    """Whether this device runs FlashAttention 3 and its package is installed."""
    return _installed() and torch.cuda.get_device_capability(device)[0] == 9


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("flash_attn_interface") is not None


@functools.cache
def activate_flash3() -> None:
    """Asks torch for version 3, unless somebody has already chosen an implementation."""
    if attention.current_flash_attention_impl() is None:
        attention.activate_flash_attention_impl("FA3")


def _maskless(name: str) -> Maskless:
    return Maskless(
        name=name,
        largest_head_dim=LARGEST_HEAD_DIM,
        attend=_attend,
        differentiate=_differentiate,
    )


FLASH = _maskless("cuda_flash").kernel()
FLASH3 = _maskless("cuda_flash3").kernel()
