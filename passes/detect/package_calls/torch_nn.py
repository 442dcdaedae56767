"""Functions of torch.nn that ask for a value in the middle of a program, and need not."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["TORCH_BIAS", "TORCH_FLEX", "TORCH_TRANSFORMER"]


def _detect_is_causal_mask(
    mask: Tensor | None, is_causal: bool | None = None, size: int | None = None
) -> bool:
    """The hint that goes along with a mask, without comparing the mask to find it.

    The mask is passed on and applied whatever the hint says; ringfx reads from it that it is
    causal. The comparison would break the graph, and hide every attention behind the break.
    """
    return is_causal is True


def causal_upper_left(*size: int) -> Tensor:
    """The mask that torch.nn.attention.bias keeps in an object which breaks the graph."""
    q_len, k_len = size
    return torch.arange(k_len) <= torch.arange(q_len)[:, None]


def causal_lower_right(*size: int) -> Tensor:
    """The same, aligned so that the last query sees the last key."""
    q_len, k_len = size
    return torch.arange(k_len) <= torch.arange(q_len)[:, None] + (k_len - q_len)


def _validate_device(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Flex attention's kernel has no backward on a CPU, and is not what runs."""


TORCH_FLEX = {"_validate_device": _validate_device}
TORCH_BIAS = {
    "causal_upper_left": causal_upper_left,
    "causal_lower_right": causal_lower_right,
}
TORCH_TRANSFORMER = {"_detect_is_causal_mask": _detect_is_causal_mask}
