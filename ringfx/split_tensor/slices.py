"""The gradient of a slice along tokens: each rank has that of its own, and zeros where it was cut.

``logits[:, :-1]`` before a loss outside the model is split as the logits are, up to where its
tokens begin; so is its gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ringfx.comm.conjugate import mask_tokens

if TYPE_CHECKING:
    from ringfx.split_tensor.spec import SplitSpec

__all__ = ["gradient_of_slice"]


def gradient_of_slice(
    spec: SplitSpec, local: torch.Tensor, args: Sequence[Any], number: str
) -> tuple[torch.Tensor, SplitSpec] | None:
    """This rank's part of ``slice_backward`` of a split gradient, and how it is split.

    ``args``: those of the call. None where the sliced value has tokens that the gradient's layout
    does not place.
    """
    _, sizes, dim, start, end, step = args
    shape = tuple(int(n) for n in sizes)
    if dim % len(shape) != spec.dim or step != 1 or spec.outer * spec.inner != 1:
        return None
    asked = range(shape[spec.dim])[start:end]
    offset = spec.offset - asked.start
    if offset < 0 or offset + shape[spec.dim] > spec.layout.length:
        return None
    _, valid = spec.index(local.device)
    mine = mask_tokens(local, valid, 0, spec.dim, spec.outer, spec.inner)
    length = shape[spec.dim]
    return mine, dataclasses.replace(
        spec, shape=shape, offset=offset, length=length, number=number
    )  # fmt: skip
