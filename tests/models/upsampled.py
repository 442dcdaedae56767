"""Transposed convolutions of tokens and images: longer by a factor, overlapping, cropped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["HIDDEN", "OF_IMAGES", "OF_TOKENS", "DownAndUp", "Upsampled", "Upsampling"]

Tensor = torch.Tensor
HIDDEN = 8


@dataclass(frozen=True, kw_only=True)
class Upsampling:
    kernel: int
    stride: int
    padding: int = 0
    more: int = 0
    """What torch calls output_padding."""
    groups: int = 1
    dilation: int = 1
    crop: tuple[int, int] = (0, 0)
    """Elements that are cut off at both ends, as audio codecs do."""

    def layer(self, kind: Callable[..., nn.Module]) -> nn.Module:
        return kind(
            HIDDEN, HIDDEN, self.kernel, self.stride, self.padding, self.more, self.groups, True,
            self.dilation,
        )  # fmt: skip


OF_TOKENS: Mapping[str, Upsampling] = {
    "overlapping": Upsampling(kernel=4, stride=2, padding=1),
    "side by side": Upsampling(kernel=2, stride=2),
    "one more": Upsampling(kernel=3, stride=2, padding=1, more=1),
    "one less": Upsampling(kernel=3, stride=2, padding=1),
    "longer": Upsampling(kernel=4, stride=2),
    "cropped": Upsampling(kernel=4, stride=2, crop=(1, 1)),
    "causal": Upsampling(kernel=4, stride=2, crop=(0, 2)),
    "far": Upsampling(kernel=16, stride=8, padding=4),
    "with gaps": Upsampling(kernel=1, stride=2),
    "dilated": Upsampling(kernel=3, stride=2, padding=2, more=1, dilation=2),
    "in groups": Upsampling(kernel=4, stride=2, padding=1, groups=2),
    "as long": Upsampling(kernel=3, stride=1, padding=1),
    "by three": Upsampling(kernel=5, stride=3, padding=1),
    "cropped before": Upsampling(kernel=5, stride=3, crop=(2, 0)),
    "cut to half": Upsampling(kernel=4, stride=2, padding=1, crop=(14, 0)),
    "wide": Upsampling(kernel=9, stride=2, padding=3),
}
OF_IMAGES: Mapping[str, Upsampling] = {
    f"image, {name}": OF_TOKENS[name] for name in ("overlapping", "side by side", "one more")
}


class Upsampled(nn.Module):
    """A convolution, tokens made longer, and a convolution of these."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.given = {**OF_TOKENS, **OF_IMAGES}[name]
        of_image = name in OF_IMAGES
        plain, longer = (
            (nn.Conv2d, nn.ConvTranspose2d) if of_image else (nn.Conv1d, nn.ConvTranspose1d)
        )
        self.first, self.last = (plain(HIDDEN, HIDDEN, 3, padding=1) for _ in range(2))
        self.up = self.given.layer(longer)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.first(x).relu())
        left, right = self.given.crop
        if left or right:
            y = y[..., left : y.shape[-1] - right]
        y = F.normalize(y, dim=1)  # padding of a line may be no zero
        return self.last(y)


class DownAndUp(nn.Module):
    """Fewer tokens attend in the middle; what was there before is joined after it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.first, self.down = nn.Conv1d(HIDDEN, HIDDEN, 3, 1, 1), nn.Conv1d(HIDDEN, 16, 4, 2, 1)
        self.qkv, self.norm = nn.Conv1d(16, 48, 1), nn.GroupNorm(2, HIDDEN)
        self.up, self.last = nn.ConvTranspose1d(16, HIDDEN, 4, 2, 1), nn.Conv1d(16, 4, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        before = self.norm(self.first(x)).relu()
        few = self.down(before).relu()
        q, k, v = self.qkv(few).mT.chunk(3, -1)
        few = few + F.scaled_dot_product_attention(q, k, v).mT
        return self.last(torch.cat([self.up(few), before], 1))
