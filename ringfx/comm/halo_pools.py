"""Windows along a split line, of what is there and in neighbouring runs: maxima, means, or all.

As in ``ringfx.comm.halo``; a pool stays a pool, so that it rounds, and passes infinities on, as the
unsplit one does. What lies beyond the ends of the line counts for nothing: -inf for a maximum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch.nn import functional as F

from ringfx.comm.conjugate import choose_tokens
from ringfx.comm.halo import joined_runs, runs_seen

__all__ = ["NOTHING", "Kind", "fill_pooled", "pool", "pool_tokens"]

Kind: TypeAlias = Literal["max", "mean", "each"]
NOTHING = {"max": -math.inf, "mean": 0.0, "each": 0.0}
"""What a window does not count."""


def pool(
    x: torch.Tensor,
    *,
    kind: Kind,
    kernel: Sequence[int],
    stride: Sequence[int],
    pads: Sequence[tuple[int, int]],
    dilation: Sequence[int],
) -> torch.Tensor:
    """[N, C, ...]: of each window its maximum, or its mean with the zeros around it.

    ``each`` gives all its elements, [N, C, ..., of each dimension those of a window].
    """
    amounts = [amount for pair in reversed(pads) for amount in pair]
    if any(amounts):
        x = F.pad(x, amounts, value=NOTHING[kind])
    rank = len(kernel)
    if kind == "each":
        for i, (size, step, apart) in enumerate(zip(kernel, stride, dilation, strict=True)):
            x = x.unfold(2 + i, apart * (size - 1) + 1, step)[..., ::apart]
        return x
    if kind == "max":
        largest = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[rank - 1]
        found: torch.Tensor = largest(x, list(kernel), list(stride), 0, list(dilation))
        return found
    mean = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[rank - 1]
    found = mean(x, list(kernel), list(stride))
    return found


def fill_pooled(
    y: torch.Tensor,
    x: torch.Tensor,
    valid: torch.Tensor,
    *,
    kind: Kind,
    kernel: Sequence[int],
    stride: Sequence[int],
    pads: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    dim: int,
    outer: int,
    inner: int,
) -> torch.Tensor:
    """A pool's result with a value where a token is padding: that of this rank's first tokens.

    It has seen -inf alone there, which a model that subtracts it would make NaN.

    Parameters
    ----------
    x
        What was pooled, padding as it stands.
    dim, outer, inner
        Of the result.
    """
    seen = dilation[dim - 2] * (kernel[dim - 2] - 1) + 1
    window = torch.arange(seen, device=x.device) % x.shape[dim]
    inner_pads = [(0, 0) if i == dim - 2 else pair for i, pair in enumerate(pads)]
    some = pool(
        x.detach().index_select(dim, window),
        kind=kind, kernel=kernel, stride=stride, pads=inner_pads, dilation=dilation,
    )  # fmt: skip
    return choose_tokens(y, some, valid, dim, outer, inner)


def pool_tokens(
    x: torch.Tensor,
    *,
    kind: Kind,
    kernel: Sequence[int],
    stride: Sequence[int],
    pads: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    lead: int,
    frames: int,
    before: int,
    after: int,
    chunks: int,
    group: str,
    dim: int,
) -> torch.Tensor:
    """A pool over this rank's tokens, whose neighbours come from where they are.

    ``x`` holds what counts for nothing where a token is padding. The other parameters are those of
    ``ringfx.comm.halo.convolve_tokens``.
    """
    at = dim - 2
    span = dilation[at] * (kernel[at] - 1) + 1
    runs = runs_seen(
        x, NOTHING[kind], stride=stride[at], span=span, lead=lead, frames=frames, before=before,
        after=after, chunks=chunks, group=group, dim=dim,
    )  # fmt: skip
    inner_pads = [(0, 0) if i == at else pair for i, pair in enumerate(pads)]
    y = pool(runs, kind=kind, kernel=kernel, stride=stride, pads=inner_pads, dilation=dilation)
    return joined_runs(y, x.shape[0], chunks, dim)
