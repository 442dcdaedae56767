"""A diffusion transformer draws: many steps of denoising, each over the patches of a large image.

torchrun --nproc-per-node 2 -m examples.diffusion
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import ringfx

STEPS, SIDE, PATCH, WIDTH, HEADS = 8, 96, 4, 64, 4


class Block(nn.Module):
    """Attention and an MLP, scaled and shifted by the step's time, as in DiT."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH, elementwise_affine=False) for _ in range(2))
        self.by_time = nn.Linear(WIDTH, 6 * WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.by_time(F.silu(time))[:, None].chunk(6, -1)
        y = self.norms[0](x) * (1 + scale) + shift
        q, k, v = self.qkv(y).view(*y.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate * self.out(y)
        found: Tensor = x + gate2 * self.mlp(self.norms[1](x) * (1 + scale2) + shift2)
        return found


class Denoiser(nn.Module):
    """What noise is in an image."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.places = nn.Parameter(0.1 * torch.randn((SIDE // PATCH) ** 2, WIDTH))
        self.time = nn.Sequential(nn.Linear(1, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.back = nn.Linear(WIDTH, 3 * PATCH**2)

    def forward(self, image: Tensor, time: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2) + self.places
        for block in self.blocks:
            x = block(x, self.time(time[:, None]))
        return F.pixel_shuffle(
            self.back(x).transpose(1, 2).unflatten(2, (SIDE // PATCH, -1)), PATCH
        )


@torch.no_grad()
def main() -> None:
    options = argparse.ArgumentParser(prog="python -m examples.diffusion")
    options.add_argument("--compiler", default="inductor", help="inductor, aot_eager or eager")
    given = options.parse_args()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")

    torch.manual_seed(0)
    model = ringfx.optimize(Denoiser().eval(), compiler=given.compiler)
    image = torch.randn(1, 3, SIDE, SIDE)
    for step in range(STEPS):  # one program, run eight times
        time = torch.full((1,), 1 - step / STEPS)
        image = image - model(image, time) / STEPS
    if not dist.is_initialized() or dist.get_rank() == 0:
        print("image", f"{image.mean().item():.5f} {image.std().item():.5f}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
