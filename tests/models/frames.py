"""Videos: attention among the places of each frame, and then among what stands for each frame."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["SUMMARIES", "WIDE", "Frames"]

Tensor = torch.Tensor
WIDE, HEADS = 16, 2


class Frames(nn.Module):
    """[batch, frames, places, width]: a summary of each frame by name, and tokens in front."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(13)
        self.summary = SUMMARIES[name]
        self.embed = nn.Sequential(nn.LayerNorm(WIDE), nn.Linear(WIDE, WIDE), nn.LayerNorm(WIDE))
        self.of_frame, self.of_all = (
            nn.Parameter(torch.randn(2, WIDE)),
            nn.Parameter(torch.randn(WIDE)),
        )
        self.norms = nn.ModuleList(nn.LayerNorm(WIDE) for _ in range(4))
        self.near, self.far = nn.Linear(WIDE, 3 * WIDE), nn.Linear(WIDE, 3 * WIDE)
        self.mlp = nn.Sequential(nn.Linear(WIDE, 4 * WIDE), nn.GELU(), nn.Linear(4 * WIDE, WIDE))

    def forward(self, video: Tensor) -> Tensor:
        x = self.summary(self, self.embed(video))
        x = torch.cat([self.of_all.expand(len(x), 1, WIDE), x], 1)
        found: Tensor = self.attend(self.far, self.norms[2], x)
        return found[:, 0] + found[:, 1:].mean(1)

    def attend(self, weights: nn.Linear, norm: nn.Module, x: Tensor) -> Tensor:
        """x [N, S, width]: SDPA over S, and an MLP."""
        q, k, v = (
            y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in weights(norm(x)).chunk(3, -1)
        )
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        made: Tensor = x + self.mlp(self.norms[3](x))
        return made

    def within(self, x: Tensor) -> Tensor:
        made: Tensor = self.attend(self.near, self.norms[1], x.flatten(0, 1)).view_as(x)
        return made


def first_token(m: Frames, x: Tensor) -> Tensor:
    """A token in front of each frame's places."""
    front = m.of_frame[0].expand(*x.shape[:2], 1, WIDE)
    return m.within(torch.cat([front, x], 2))[:, :, 0]


def last_tokens(m: Frames, x: Tensor) -> Tensor:
    """Two tokens behind each frame's places."""
    behind = m.of_frame.expand(*x.shape[:2], 2, WIDE)
    return m.within(torch.cat([x, behind], 2))[:, :, -2:].sum(2)


def mean(m: Frames, x: Tensor) -> Tensor:
    """Of all places; no token is joined to a frame."""
    return m.within(x).mean(2)


def places_first(m: Frames, x: Tensor) -> Tensor:
    """Frames are the slower part of one dimension."""
    b, f, n, c = x.shape
    joined = torch.cat([m.of_frame[0].expand(b * f, 1, c), x.reshape(b * f, n, c)], 1)
    return m.attend(m.near, m.norms[1], joined)[:, 0].unflatten(0, (b, f))


def among_frames_too(m: Frames, x: Tensor) -> Tensor:
    """Each place attends along the frames before: without class tokens this is a grid."""
    b, f, n, c = x.shape
    along = m.attend(m.far, m.norms[0], x.transpose(1, 2).reshape(b * n, f, c))
    return first_token(m, along.view(b, n, f, c).transpose(1, 2))


SUMMARIES: Mapping[str, Callable[[Frames, Tensor], Tensor]] = {
    "first token": first_token, "last tokens": last_tokens, "mean": mean,
    "places first": places_first, "among frames too": among_frames_too,
}  # fmt: skip
