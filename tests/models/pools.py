"""Windows of tokens that overlap: maxima and means, in many spellings, and what resembles them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["DECOYS", "HIDDEN", "OVER_IMAGES", "OVER_TOKENS", "Pooled"]

Tensor = torch.Tensor
HIDDEN = 6


class Pooled(nn.Module):
    """A layer, a pool by name, a layer: of an image [B, C, H, W] or of tokens [B, N, C]."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.pool, self.of_tokens = (
            {**OVER_IMAGES, **OVER_TOKENS, **DECOYS}[name],
            name in OVER_TOKENS,
        )
        self.inp, self.out = nn.Conv2d(HIDDEN, HIDDEN, 1), nn.Conv2d(HIDDEN, HIDDEN, 3, padding=1)
        self.mix, self.end = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        if self.of_tokens:
            return self.end(self.pool(self.mix(x).tanh()))
        return self.out(self.pool(self.inp(x)))


def smaller(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 2, 1)


def as_large(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 1, 1)


def without_padding(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 1)


def large(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 5, 1, 2)


def apart(x: Tensor) -> Tensor:
    """Elements between windows are in none."""
    return F.max_pool2d(x, 2, 3)


def dilated(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 1, 1, dilation=2)


def rounded_up(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 2, 1, ceil_mode=True)


def uneven(x: Tensor) -> Tensor:
    return F.max_pool2d(x, (3, 2), (2, 1), (1, 0))


def with_unread_indices(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 2, 1, return_indices=True)[0]


def one_by_one(x: Tensor) -> Tensor:
    """Without a batch."""
    return torch.stack([F.max_pool2d(y, 3, 2, 1) for y in x])


def of_volumes(x: Tensor) -> Tensor:
    return F.max_pool3d(x.unsqueeze(2), (1, 3, 3), (1, 2, 1), (0, 1, 1)).squeeze(2)


def stacked(x: Tensor) -> Tensor:
    return F.max_pool2d(F.max_pool2d(x, 3, 1, 1).relu(), 3, 2, 1)


def smallest(x: Tensor) -> Tensor:
    return -F.max_pool2d(-x, 3, 2, 1)


def opened(x: Tensor) -> Tensor:
    """Smallest, then largest."""
    return F.max_pool2d(-F.max_pool2d(-x, 3, 1, 1), 3, 1, 1)


def of_ties(x: Tensor) -> Tensor:
    """Many elements are equal, and the first of them has the gradient."""
    return F.max_pool2d(x.relu(), 3, 2, 1)


def of_infinities(x: Tensor) -> Tensor:
    """Some places count for nothing."""
    return F.max_pool2d(x.masked_fill(x < -0.5, -torch.inf), 3, 2, 1).clamp_min(-3)


def each_patch(x: Tensor) -> Tensor:
    high, wide = x.shape[2:]
    seen = F.unfold(x, 3, padding=1).unflatten(1, (HIDDEN, 9)).unflatten(-1, (high, wide))
    return seen.tanh().cumsum(2).amax(2)


def each_dilated_patch(x: Tensor) -> Tensor:
    """Only every second row."""
    seen = F.unfold(x, 3, padding=(2, 1), stride=(2, 1), dilation=(2, 1))
    return seen.unflatten(1, (HIDDEN, 9)).unflatten(-1, (-1, x.shape[3])).sin().sum(2)


def mean(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 2, 1)


def mean_as_large(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1)


def mean_without_padding(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, (3, 1), 1)


def mean_of_those_inside(x: Tensor) -> Tensor:
    """At the edges of fewer elements."""
    return F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)


def mean_of_those_around(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) - x


OVER_IMAGES: Mapping[str, Callable[[Tensor], Tensor]] = {
    f.__name__: f
    for f in (
        smaller, as_large, without_padding, large, apart, dilated, rounded_up, uneven,
        with_unread_indices, one_by_one, of_volumes, stacked, smallest, opened, of_ties,
        of_infinities, each_patch, each_dilated_patch, mean, mean_as_large, mean_without_padding,
        mean_of_those_inside, mean_of_those_around,
    )
}  # fmt: skip


def along(x: Tensor) -> Tensor:
    return F.max_pool1d(x.mT, 3, 2, 1).mT


def along_as_many(x: Tensor) -> Tensor:
    return x - F.max_pool1d(x.mT, 3, 1, 1).mT


def along_by_module(x: Tensor) -> Tensor:
    return nn.MaxPool1d(5, 2, 2)(x.transpose(1, 2)).transpose(1, 2)


def mean_along(x: Tensor) -> Tensor:
    return F.avg_pool1d(x.mT, 3, 2, 1).mT


def each_window(x: Tensor) -> Tensor:
    return x.unfold(1, 3, 1).cumsum(-1).flatten(2)[..., :HIDDEN]


def each_strided_window(x: Tensor) -> Tensor:
    return x.unfold(1, 4, 2).tanh().amax(-1)


def each_window_of_infinities(x: Tensor) -> Tensor:
    """A window has its own elements alone: no infinity times zero."""
    wide = F.pad(x.masked_fill(x < -0.5, -torch.inf), (0, 0, 1, 1))
    return wide.unfold(1, 3, 1).amax(-1).clamp_min(-3)


OVER_TOKENS: Mapping[str, Callable[[Tensor], Tensor]] = {
    f.__name__: f
    for f in (
        along, along_as_many, along_by_module, mean_along, each_window, each_strided_window,
        each_window_of_infinities,
    )
}  # fmt: skip


def indices(x: Tensor) -> Tensor:
    """Where each maximum is, is read too."""
    found, where = F.max_pool2d(x, 3, 2, 1, return_indices=True)
    return found + where * 0.01


def to_a_size(x: Tensor) -> Tensor:
    return F.adaptive_max_pool2d(x, (5, 2))


def of_other_channels(x: Tensor) -> Tensor:
    """Along the channels, which are no tokens."""
    return F.max_pool1d(x.permute(0, 2, 3, 1).flatten(1, 2), 3, 1, 1).unflatten(
        1, x.shape[2:]
    ).permute(0, 3, 1, 2)  # fmt: skip


DECOYS: Mapping[str, Callable[[Tensor], Tensor]] = {
    f.__name__: f for f in (indices, to_a_size, of_other_channels)
}
