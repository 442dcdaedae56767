"""What the CUDA kernels want of shapes, and back.

Key/value heads are written out to the number of query heads, which every kernel takes in every
release, and their gradients added. Head dims are padded with zeros, which change neither scores nor
output.

Shapes: B batch, H query heads, G key/value heads, K keys, D head dim.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

__all__ = ["collapse_heads", "expand_heads", "pad_head_dims"]

Tensor = torch.Tensor

HEAD_DIM_MULTIPLE = 8
"""The kernels read 16 bytes at once, which is 8 halves."""


def expand_heads(x_BGKD: Tensor, heads: int) -> Tensor:
    """Each key/value head once for every query head that reads it: [B, H, K, D]."""
    G = x_BGKD.shape[1]
    return x_BGKD if heads == G else x_BGKD.repeat_interleave(heads // G, dim=1)


def collapse_heads(x_BHKD: Tensor, groups: int) -> Tensor:
    """The gradient of ``expand_heads``: [B, G, K, D]."""
    B, H, K, D = x_BHKD.shape
    return x_BHKD if groups == H else x_BHKD.view(B, groups, H // groups, K, D).sum(2)


def pad_head_dims(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Zeros appended to the last dim up to a multiple of HEAD_DIM_MULTIPLE."""

    def pad(x: Tensor) -> Tensor:
        missing = -x.shape[-1] % HEAD_DIM_MULTIPLE
        return F.pad(x, (0, missing)) if missing else x

    return tuple(pad(x) for x in tensors)
