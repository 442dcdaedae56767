"""Attention to few keys that are weighed sums of all tokens, by weights [tokens, keys]."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["KEYS", "PROJECTED", "WIDE", "Projected"]

Tensor = torch.Tensor
WIDE, HEADS, KEYS, LAYERS = 16, 2, 6, 2


class Layer(nn.Module):
    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(WIDE), nn.Linear(WIDE, 3 * WIDE)
        self.weights = nn.Parameter(torch.randn(2, tokens, KEYS) / tokens**0.5)
        self.biased = nn.Linear(tokens, KEYS)
        self.of_tokens = nn.Linear(tokens, tokens)


class Projected(nn.Module):
    """Layers of attention whose keys and values are made of all tokens in a way by name."""

    def __init__(self, name: str, tokens: int) -> None:
        super().__init__()
        torch.manual_seed(17)
        self.project = PROJECTED[name]
        self.layers = nn.ModuleList(Layer(tokens) for _ in range(LAYERS))
        self.out = nn.Linear(WIDE, WIDE)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            q, k, v = layer.qkv(layer.norm(x)).chunk(3, -1)  # type: ignore[operator]
            k, v = self.project(layer, k, v)  # type: ignore[arg-type]
            heads = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in (q, k, v))
            x = x + F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
            x = x + self.out(x).tanh()
        return x


def einsum(m: Layer, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    made = [torch.einsum("bnd,nk->bkd", y, w) for y, w in zip((k, v), m.weights, strict=True)]
    return made[0], made[1]


def products(m: Layer, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return m.weights[0].T @ k, m.weights[1].t().matmul(v)


def shared(m: Layer, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values by the same weights, at once."""
    both = torch.einsum("sbnd,nk->sbkd", torch.stack([k, v]), m.weights[0])
    return both[0], both[1]


def linear(m: Layer, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Of tokens that are the last dimension."""
    made = [F.linear(y.mT, w.T).mT for y, w in zip((k, v), m.weights, strict=True)]
    return made[0], made[1]


def weighed(m: Layer, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """By weights that add up to one."""
    w = m.weights.softmax(1)
    return torch.einsum("nk,bnd->bkd", w[0], k), torch.einsum("nk,bnd->bkd", w[1], v)


PROJECTED: Mapping[str, Callable[[Layer, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "einsum": einsum, "products": products, "shared": shared, "linear": linear,
    "weighed": weighed,
}  # fmt: skip
