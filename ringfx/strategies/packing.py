"""K and V (or their gradients) as one flat buffer, so that a hop is one message.

Shapes: N all elements of both.
"""

from __future__ import annotations

import torch

__all__ = ["pack", "pack_into", "unpack"]

Tensor = torch.Tensor


def pack(first: Tensor, second: Tensor) -> Tensor:
    """Both tensors one after the other, contiguous, [N]."""
    return pack_into(first.new_empty(first.numel() + second.numel()), first, second)


def pack_into(buffer_N: Tensor, first: Tensor, second: Tensor) -> Tensor:
    buffer_N[: first.numel()].view(first.shape).copy_(first)
    buffer_N[first.numel() :].view(second.shape).copy_(second)
    return buffer_N


def unpack(buffer_N: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Views of a buffer with the shapes of the tensors that it was packed from."""
    return (
        buffer_N[: first.numel()].view(first.shape),
        buffer_N[first.numel() :].view(second.shape),
    )
