"""A long prompt is read by all ranks together; then tokens are generated one by one.

    torchrun --nproc-per-node 2 -m examples.generation

The prompt is the long part: its attention and activations are split. ``generate`` then goes on on
every rank alike, as it does without ringfx.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

import ringfx


@torch.no_grad()
def main() -> None:
    options = argparse.ArgumentParser(prog="python -m examples.generation")
    options.add_argument("--tokens", type=int, default=1500, help="of the prompt")
    options.add_argument("--compiler", default="inductor", help="inductor, aot_eager or eager")
    given = options.parse_args()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
        initializer_range=0.3, eos_token_id=None, bos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model: Any = ringfx.optimize(LlamaForCausalLM(config), compiler=given.compiler)
    model.train(False)
    prompt = (torch.arange(given.tokens) * 7 % 251)[None]
    scores = model(input_ids=prompt, use_cache=False).logits[:, -1]  # the rest is never computed
    written = model.generate(prompt, max_new_tokens=8, do_sample=False)
    if not dist.is_initialized() or dist.get_rank() == 0:
        print("next", scores.argmax(-1).item(), "written", written[0, -8:].tolist())
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
