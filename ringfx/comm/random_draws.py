"""Random draws of split values: each rank draws what the unsplit model would, and keeps its part.

A generator gives its numbers in the order of the whole tensor's memory, and how many it uses
depends on the whole size. So every rank draws for the whole tensor, in the unsplit program's shape,
strides and type, and takes its own tokens: results are those of the unsplit model, and all ranks'
generators move on equally. Nothing is gathered, but the whole draw is held for this one call: for
dropout two tensors of the whole size and a byte an element (nothing under Inductor, which draws
elements where they are used); otherwise one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ringfx.comm.conjugate import take_tokens

__all__ = ["draw", "dropout"]


def dropout(
    x: torch.Tensor, index: torch.Tensor, p: float, shape: Sequence[int], stride: Sequence[int],
    dim: int, outer: int, inner: int,
) -> torch.Tensor:  # fmt: skip
    """``F.dropout`` of this rank's tokens x of a tensor of the given shape and strides."""
    if p == 1:
        return x * 0.0
    # What F.dropout becomes under compilers, and equal to it without; what it drops is not read.
    stand_in = torch.empty_strided(shape, stride, dtype=x.dtype, device=x.device)
    kept = take_tokens(torch.native_dropout(stand_in, p, True)[1], index, dim, outer, inner)
    return x * (kept.to(x.dtype) / (1 - p))


def draw(
    x: torch.Tensor, index: torch.Tensor, op: Any, args: Sequence[Any], kwargs: Mapping[str, Any],
    shape: Sequence[int], stride: Sequence[int], dim: int, outer: int, inner: int,
) -> torch.Tensor:  # fmt: skip
    """This rank's tokens of ``op(like, *args, **kwargs)``, which reads no value of ``like``."""
    like = torch.empty_strided(shape, stride, dtype=x.dtype, device=x.device)
    with torch.no_grad():
        return take_tokens(op(like, *args, **kwargs), index, dim, outer, inner)
