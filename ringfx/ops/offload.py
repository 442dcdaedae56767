"""A value that waits in the host's memory between forward and backward.

``offloaded`` marks it in a program, as an operator of its own, so that it is found again in the
program that autograd has been traced into (``compile/offload.py``).
"""

from __future__ import annotations

import torch

from ringfx.comm.autograd_function import register_autograd

__all__ = ["offloaded"]

Tensor = torch.Tensor


def offloaded(x: Tensor) -> Tensor:
    """x, of any shape. What backward reads of it is sent to the host and fetched again."""
    found: Tensor = torch.ops.ringfx.offloaded(x)
    return found


@torch.library.custom_op("ringfx::offloaded", mutates_args=())
def _offloaded(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


@_offloaded.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _backward(ctx: object, grad: Tensor) -> Tensor:
    return grad


register_autograd(_offloaded, _backward)
