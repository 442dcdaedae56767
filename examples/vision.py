"""A vision transformer classifies large images: their patches are the sequence.

torchrun --nproc-per-node 2 -m examples.vision
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from transformers import ViTConfig, ViTForImageClassification

import ringfx


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m examples.vision")
    options.add_argument("--compiler", default="inductor", help="inductor, aot_eager or eager")
    given = options.parse_args()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")

    torch.manual_seed(0)
    config = ViTConfig(
        image_size=144, patch_size=8, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    config.num_labels = 10
    model = ringfx.optimize(ViTForImageClassification(config), compiler=given.compiler)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    images, labels = torch.randn(4, 3, 144, 144), torch.tensor([1, 7, 3, 0])
    losses = []
    for _ in range(5):
        loss = cross_entropy(model(images).logits, labels)  # 324 patches and a class token
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
