"""A small decoder whose modules have names to be found by."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["Block", "Decoder", "ids"]


class Block(nn.Module):
    """Attention whose heads are split by functions, and an MLP of modules."""

    def __init__(self, width: int = 16, heads: int = 2, window: int = 0) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, d = x.shape
        q, k, v = (
            t.view(b, n, self.heads, -1).transpose(1, 2)
            for t in self.qkv(self.norm(x)).chunk(3, -1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, n, d))
        result: torch.Tensor = x + self.mlp(x)
        return result


class Decoder(nn.Module):
    """Ids in, logits out, and no loss."""

    def __init__(self, layers: int = 2, words: int = 40, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, words)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        logits: torch.Tensor = self.head(x)
        return logits


def ids(tokens: int = 21, words: int = 40) -> torch.Tensor:
    return torch.randint(0, words, (1, tokens), generator=torch.Generator().manual_seed(0))
