"""LoRA with PEFT: adapters train, the frozen model is split with them.

torchrun --nproc-per-node 2 -m examples.lora
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import ringfx


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m examples.lora")
    options.add_argument("--compiler", default="inductor", help="inductor, aot_eager or eager")
    given = options.parse_args()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    model = get_peft_model(LlamaForCausalLM(config), lora)
    model.enable_input_require_grads()
    model = ringfx.optimize(model, compiler=given.compiler)  # the line
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    tokens = (torch.arange(401) * 7 % 251)[None]
    losses = []
    for _ in range(5):
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
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
