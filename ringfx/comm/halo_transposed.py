"""Transposed convolutions along a split line: each token is several elements of the result.

As in ``ringfx.comm.halo``: a run's elements are sums of its tokens and of those at the borders of
the runs next to it. Nothing is beyond the ends of the line.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ringfx.comm.conjugate import choose_tokens
from ringfx.comm.halo import joined_runs, runs_between

__all__ = ["fill_transposed", "transposed_convolution", "transposed_tokens"]


def transposed_convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    stride: Sequence[int],
    crops: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """A transposed convolution without so many elements at both ends of each dimension.

    Fewer than none at the end: there are more, that no input reaches.
    """
    before = [left for left, _ in crops]
    beyond = [max(left - right, 0) for left, right in crops]
    y: torch.Tensor = torch.ops.aten.convolution.default(
        x, weight, bias, list(stride), before, list(dilation), True, beyond, groups
    )
    for i, (left, right) in enumerate(crops):
        y = y.narrow(2 + i, 0, y.shape[2 + i] - max(right - left, 0))
    return y


def transposed_tokens(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    stride: Sequence[int],
    crops: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int,
    frames: int,
    before: int,
    after: int,
    chunks: int,
    group: str,
    dim: int,
) -> torch.Tensor:
    """A transposed convolution of this rank's tokens, whose neighbours come from where they are.

    The parameters are those of ``ringfx.comm.halo.convolve_tokens``.
    """
    at = dim - 2
    runs = runs_between(
        x, 0.0, frames=frames, before=before, after=after, chunks=chunks, group=group, dim=dim
    )
    inner_crops = [(0, 0) if i == at else pair for i, pair in enumerate(crops)]
    y = transposed_convolution(
        runs, weight, bias, stride=stride, crops=inner_crops, dilation=dilation, groups=groups
    )
    first = before * frames * stride[at] + crops[at][0]
    y = y.narrow(dim, first, stride[at] * (x.shape[dim] // chunks))
    return joined_runs(y, x.shape[0], chunks, dim)


def fill_transposed(
    y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    valid: torch.Tensor,
    *,
    stride: Sequence[int],
    crops: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int,
    dim: int,
    outer: int,
    inner: int,
) -> torch.Tensor:
    """As ``ringfx.comm.halo.fill_convolved``: one element that this rank's first tokens make."""
    at = dim - 2
    seen = -(-(dilation[at] * (weight.shape[dim] - 1) + 1) // stride[at])
    window = torch.arange(seen, device=x.device) % x.shape[dim]
    inner_crops = [(0, 0) if i == at else pair for i, pair in enumerate(crops)]
    some = transposed_convolution(
        x.detach().index_select(dim, window), weight.detach(),
        None if bias is None else bias.detach(),
        stride=stride, crops=inner_crops, dilation=dilation, groups=groups,
    ).narrow(dim, stride[at] * (seen - 1), 1)  # fmt: skip
    return choose_tokens(y, some, valid, dim, outer, inner)
