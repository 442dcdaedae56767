"""Streams of tokens with weights of their own, joined for attention and cut apart after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["FEW", "IN_LINE", "JOINED", "Streams"]

Tensor = torch.Tensor
WIDE, HEADS, LAYERS = 16, 2, 2


class Layer(nn.Module):
    """What one stream does by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.LayerNorm(WIDE), nn.LayerNorm(WIDE)
        self.qkv, self.out = nn.Linear(WIDE, 3 * WIDE), nn.Linear(WIDE, WIDE)
        self.mlp = nn.Sequential(nn.Linear(WIDE, 4 * WIDE), nn.GELU(), nn.Linear(4 * WIDE, WIDE))

    def qkv_of(self, x: Tensor) -> Tensor:
        """[3, batch, heads, tokens, width of a head]."""
        made: Tensor = self.qkv(self.before(x)).unflatten(-1, (3, HEADS, -1))
        return made.permute(2, 0, 3, 1, 4)

    def rest(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = x + self.out(mixed)
        made: Tensor = x + self.mlp(self.after(x))
        return made


class Streams(nn.Module):
    """Two streams, of few tokens and of many, that meet in a way by name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.meet = WAYS[name]
        self.few = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.many = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.extra = nn.Parameter(torch.randn(1, 3, WIDE))

    def forward(self, few: Tensor, many: Tensor) -> tuple[Tensor, ...]:
        layers: Any = zip(self.few, self.many, strict=True)
        for one, other in layers:
            few, many = self.meet(self, one, other, few, many)
        return few, many.square()


Way = Callable[[Streams, Layer, Layer, Tensor, Tensor], tuple[Tensor, ...]]


def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask).transpose(1, 2).flatten(2)


def in_front(m: Streams, one: Layer, other: Layer, few: Tensor, many: Tensor) -> tuple[Tensor, ...]:
    joined = [torch.cat(x, 2) for x in zip(one.qkv_of(few), other.qkv_of(many), strict=True)]
    mixed, n = attend(*joined), few.shape[1]
    return one.rest(few, mixed[:, :n]), other.rest(many, mixed[:, n:])


def behind(m: Streams, one: Layer, other: Layer, few: Tensor, many: Tensor) -> tuple[Tensor, ...]:
    """Joined as three at once, and cut by sizes."""
    mixed = attend(*torch.cat([other.qkv_of(many), one.qkv_of(few)], 3))
    seen, read = mixed.split([many.shape[1], few.shape[1]], 1)
    return one.rest(few, read), other.rest(many, seen)


def between(m: Streams, one: Layer, other: Layer, few: Tensor, many: Tensor) -> tuple[Tensor, ...]:
    """With a half of the many on each side, joined before heads are."""
    half, n = many.shape[1] // 2, few.shape[1]
    q, k, v = other.qkv_of(torch.cat([many[:, :half], few, many[:, half:]], 1))
    mixed = attend(q, k, v)
    rest = torch.cat([mixed[:, :half], mixed[:, half + n :]], 1)
    return one.rest(few, mixed.narrow(1, half, n)), other.rest(many, rest)


def masked(m: Streams, one: Layer, other: Layer, few: Tensor, many: Tensor) -> tuple[Tensor, ...]:
    """The last of the few are hidden from all."""
    n, places = few.shape[1], torch.arange(few.shape[1] + many.shape[1])
    shown = (places < n - 2) | (places >= n)
    joined = [torch.cat(x, 2) for x in zip(one.qkv_of(few), other.qkv_of(many), strict=True)]
    q, k, v = joined
    mixed = attend(q, k, v, shown[None, None, None])
    return one.rest(few, mixed[:, :n]), other.rest(many, mixed[:, n:])


def numbered(m: Streams, one: Layer, other: Layer, few: Tensor, many: Tensor) -> tuple[Tensor, ...]:
    """Kinds of tokens are numbers, which are joined as the tokens are."""
    kinds = [torch.arange(x.shape[1], device=x.device) % 3 for x in (few, many)]
    few = few * m.extra[0, kinds[0]]
    q, k, v = (torch.cat(x, 2) for x in zip(one.qkv_of(few), other.qkv_of(many), strict=True))
    mixed = attend(q, k, v) + m.extra[0, torch.cat(kinds)]
    n = few.shape[1]
    return one.rest(few, mixed[:, :n]), other.rest(many, mixed[:, n:])


def with_more(
    m: Streams, one: Layer, other: Layer, few: Tensor, many: Tensor
) -> tuple[Tensor, ...]:
    """Tokens of the model's own stand before the few, and are dropped again."""
    longer = torch.cat([m.extra.expand(len(few), -1, -1), few], 1)
    joined = [torch.cat(x, 2) for x in zip(one.qkv_of(longer), other.qkv_of(many), strict=True)]
    mixed, n = attend(*joined), longer.shape[1]
    return one.rest(longer, mixed[:, :n])[:, 3:], other.rest(many, mixed[:, n:])


def once(m: Streams, one: Layer, other: Layer, few: Tensor, many: Tensor) -> tuple[Tensor, ...]:
    """The few only read: they have no part of the result, but much is computed for them."""
    few = one.rest(few, few)
    q, k, v = (torch.cat(x, 2) for x in zip(one.qkv_of(few), other.qkv_of(many), strict=True))
    return few, other.rest(many, attend(q[:, :, few.shape[1] :], k, v))


def registers(
    m: Streams, one: Layer, other: Layer, few: Tensor, many: Tensor
) -> tuple[Tensor, ...]:
    """Nothing is computed of the few alone."""
    x = torch.cat([few, many], 1)
    x = other.rest(x, attend(*other.qkv_of(x)))
    return x[:, : few.shape[1]], x[:, few.shape[1] :]


JOINED: Mapping[str, Way] = {
    "in front": in_front, "behind": behind, "between": between, "masked": masked,
    "numbered": numbered, "with more": with_more, "once": once,
}  # fmt: skip
"""The few are a line of their own."""
IN_LINE: Mapping[str, Way] = {"registers": registers}
"""The few are stored along the many."""
WAYS: Mapping[str, Way] = {**JOINED, **IN_LINE}
FEW = 6
