"""A model in plain PyTorch, its attention spelled with matmul and softmax: found, and split.

torchrun --nproc-per-node 2 -m examples.own_attention
"""

from __future__ import annotations

import argparse
import math
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import ringfx


class Block(nn.Module):
    """Causal attention over the last 64 tokens, each head with a temperature that is trained."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.mlp = nn.Sequential(
            nn.RMSNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for y in self.qkv(self.norm(x)).chunk(3, -1)
        )
        scores = self.temperature * q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        distance = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
        scores = scores.masked_fill((distance < 0) | (distance >= 64), -math.inf)
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        added: Tensor = self.mlp(x)
        return x + added


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 64)
        self.blocks = nn.ModuleList(Block(64, 4) for _ in range(2))
        self.head = nn.Linear(64, 256, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m examples.own_attention")
    options.add_argument("--compiler", default="inductor", help="inductor, aot_eager or eager")
    given = options.parse_args()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")

    torch.manual_seed(0)
    model = ringfx.optimize(Model(), compiler=given.compiler)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = (torch.arange(403) * 7 % 251)[None]
    losses = []
    for _ in range(5):
        loss = model(tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if not dist.is_initialized() or dist.get_rank() == 0:
        print("loss", " ".join(f"{loss:.4f}" for loss in losses))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
