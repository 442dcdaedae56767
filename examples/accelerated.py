"""A loop of Hugging Face accelerate over a split sequence: one line more.

torchrun --nproc-per-node 2 -m examples.accelerated
torchrun --nproc-per-node 4 -m examples.accelerated --sequence-ranks 2
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

import ringfx.integrations.accelerate


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m examples.accelerated")
    options.add_argument("--sequence-ranks", type=int, help="ranks that share a sequence: all")
    options.add_argument("--compiler", default="inductor", help="inductor, aot_eager or eager")
    given = options.parse_args()

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256, n_embd=64, n_layer=2, n_head=4, n_positions=512, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    rows = torch.arange(16 * 203).view(16, 203) * 11 % 251
    data: Any = [{"input_ids": row, "labels": row} for row in rows]

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    accelerator = ringfx.integrations.accelerate.prepare(  # the line
        accelerator, sequence_ranks=given.sequence_ranks, compiler=given.compiler
    )
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.AdamW(model.parameters(), lr=1e-3), DataLoader(data, batch_size=2)
    )
    losses = []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(accelerator.gather(loss.detach()).mean().item())
    accelerator.print("loss", " ".join(f"{loss:.4f}" for loss in losses))
    accelerator.end_training()


if __name__ == "__main__":
    main()
