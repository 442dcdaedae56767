"""Tokens and images that are padded with tokens of their own: round about, mirrored, repeated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["HIDDEN", "OF_IMAGES", "OF_TOKENS", "Padded"]

Tensor = torch.Tensor
HIDDEN = 6
Mode: TypeAlias = Literal["zeros", "reflect", "replicate", "circular"]


def convolved(mode: Mode, padding: int) -> Callable[[], nn.Module]:
    kernel = 2 * padding + 1
    return lambda: nn.Conv1d(HIDDEN, HIDDEN, kernel, padding=padding, padding_mode=mode)


class Frames(nn.Module):
    """The magnitudes of overlapping frames, mirrored at both ends, as of a spectrogram."""

    def forward(self, x: Tensor) -> Tensor:
        frames = F.pad(x, (4, 4), mode="reflect").unfold(-1, 8, 4)
        found: Tensor = torch.fft.rfft(frames).abs()
        return found


class Uneven(nn.Module):
    """On one side more than on the other, and on one alone."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(F.pad(x, (2, 1), mode="replicate"), (0, 2), mode="circular")
        return F.pad(x, (3, 0), mode="reflect").tanh()


OF_TOKENS: Mapping[str, Callable[[], nn.Module]] = {
    "circular": convolved("circular", 1),
    "mirrored": convolved("reflect", 1),
    "repeated": convolved("replicate", 1),
    "circular, wide": convolved("circular", 3),
    "mirrored, wide": convolved("reflect", 2),
    "repeated, wide": convolved("replicate", 3),
    "frames": Frames,
    "uneven": Uneven,
}


def image(*modes: Mode) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        *(nn.Conv2d(HIDDEN, HIDDEN, 3, padding=1, padding_mode=mode) for mode in modes)
    )


class Globe(nn.Module):
    """Columns go round the globe, rows end at the poles."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(HIDDEN, HIDDEN, 3)

    def forward(self, x: Tensor) -> Tensor:
        round_about = F.pad(x, (1, 1, 0, 0), mode="circular")
        return x + self.layer(F.pad(round_about, (0, 0, 1, 1))).tanh()


OF_IMAGES: Mapping[str, Callable[[], nn.Module]] = {
    "all modes": image("reflect", "circular", "replicate"),
    "mirrored images": image("reflect", "reflect"),
    "globe": Globe,
}


class Padded(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(2)
        first = nn.Conv2d if name in OF_IMAGES else nn.Conv1d
        self.first, self.body = first(HIDDEN, HIDDEN, 1), {**OF_TOKENS, **OF_IMAGES}[name]()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.body(self.first(x).relu())
        return found
