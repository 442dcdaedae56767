"""A LongNet encoder for long inputs of patches, trained on one rank and split over several.

    python -m examples.longnet                                     one rank
    torchrun --nproc-per-node 2 -m examples.longnet --ringfx       its tokens split over two

The model is plain PyTorch with ``ringfx.nn.DilatedAttention``: a patch embedding, layers of dilated
attention and an MLP, mean pooling, a linear head (LongNet, arXiv 2307.02486; GigaPath's slide
encoder has this form). Both commands print the same losses.
"""

from __future__ import annotations

import argparse
import os
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import ringfx

PATCH = 48


class Layer(nn.Module):
    """Attention and MLP, each behind a norm and added to what it was given."""

    def __init__(self, dim: int, heads: int, segments: list[int], rates: list[int]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attention = ringfx.nn.DilatedAttention(dim, heads, segments, rates)
        self.mlp = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm(x))
        mixed: torch.Tensor = x + self.mlp(x)
        return mixed


class LongNet(nn.Module):
    """Patches [batch, tokens, PATCH] to one score for each class, [batch, classes]."""

    def __init__(self, dim: int = 64, heads: int = 4, layers: int = 4, classes: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH, dim)
        segments, rates = [1024, 2048, 4096], [1, 2, 4]
        self.layers = nn.ModuleList(Layer(dim, heads, segments, rates) for _ in range(layers))
        self.head = nn.Linear(dim, classes)

    def forward(self, patches: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        x = self.embed(patches)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x.mean(1)), label)


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    if options.ringfx and "RANK" in os.environ:
        dist.init_process_group("gloo")
    first = not dist.is_initialized() or dist.get_rank() == 0
    torch.manual_seed(0)
    model = LongNet()
    step = ringfx.optimize(model, compiler=options.compiler) if options.ringfx else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    for number in range(options.steps):
        patches = torch.randn(1, options.tokens, PATCH) + number % 2
        begin = time.monotonic()
        loss = step(patches, torch.tensor([number % 2]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if first:
            print(f"step {number}: loss {loss.item():.6f}, {time.monotonic() - begin:.2f} s")
    if first and options.ringfx:
        print(step.plan)
    if dist.is_initialized():
        dist.destroy_process_group()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.longnet", description=__doc__)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ringfx", action="store_true", help="split it over the ranks")
    parser.add_argument("--compiler", default="inductor", help="of ringfx: inductor, aot_eager")
    return parser.parse_args()


if __name__ == "__main__":
    main()
