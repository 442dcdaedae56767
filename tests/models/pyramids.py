"""Images whose pixels are convolved and pooled before their few patches attend."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["POOLED", "Pyramid"]

Tensor = torch.Tensor
WIDE, HEADS = 8, 2
Pool = Callable[["Pyramid", Tensor], Tensor]


class Pyramid(nn.Module):
    """A convolution, pools by name, and attention over all that is left."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.pool = POOLED[name]
        self.near, self.over = nn.Conv2d(3, WIDE, 3, padding=1), nn.Conv2d(WIDE, WIDE, 3, padding=1)
        self.qkv = nn.Conv2d(WIDE, 3 * WIDE, 1)

    def forward(self, image: Tensor) -> Tensor:
        found = self.pool(self, F.gelu(self.near(image)))
        q, k, v = (
            self.qkv(found).unflatten(1, (3, HEADS, -1)).flatten(4).transpose(-2, -1).unbind(1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        return found.flatten(2) + mixed.transpose(-2, -1).flatten(1, 2)


def means(m: Pyramid, x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)


def maxima(m: Pyramid, x: Tensor) -> Tensor:
    return F.max_pool2d(x, 2)


def means_of_rows(m: Pyramid, x: Tensor) -> Tensor:
    return F.avg_pool2d(x, (2, 1))


def twice(m: Pyramid, x: Tensor) -> Tensor:
    return F.avg_pool2d(m.over(F.avg_pool2d(x, 2)), 2)


def beside_a_shortcut(m: Pyramid, x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2) + F.avg_pool2d(m.over(x), 2)


def unfolded(m: Pyramid, x: Tensor) -> Tensor:
    """Overlapping windows whose elements are weighed, as a convolution does."""
    high, wide = x.shape[-2] // 2, x.shape[-1] // 2
    windows = F.unfold(x, 3, padding=1, stride=2).transpose(1, 2) @ m.over.weight.flatten(1).mT
    return windows.transpose(1, 2).unflatten(2, (high, wide))


def overlapping(m: Pyramid, x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=2, padding=1)


POOLED: Mapping[str, Pool] = {
    f.__name__: f
    for f in (means, maxima, means_of_rows, twice, beside_a_shortcut, unfolded, overlapping)
}
