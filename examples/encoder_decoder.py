"""An encoder and a decoder with sequences of their own lengths: T5 learns to copy.

torchrun --nproc-per-node 2 -m examples.encoder_decoder
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from transformers import T5Config, T5ForConditionalGeneration

import ringfx


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m examples.encoder_decoder")
    options.add_argument("--compiler", default="inductor", help="inductor, aot_eager or eager")
    given = options.parse_args()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=128, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0,
        use_cache=False,
    )  # fmt: skip
    config.decoder_start_token_id = 0
    model = ringfx.optimize(T5ForConditionalGeneration(config), compiler=given.compiler)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    source = (torch.arange(2 * 250).view(2, 250) * 13 % 120) + 2
    target = source[:, :90].clone()
    losses = []
    for _ in range(5):
        loss = model(input_ids=source, labels=target).loss
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
