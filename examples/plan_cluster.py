"""Before any GPU hour: what fits 64 H100, how fast, and what to change where it does not fit.

python -m examples.plan_cluster
"""

from __future__ import annotations

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ringfx
from ringfx.errors import OutOfMemory


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m examples.plan_cluster")
    options.add_argument("--layers", type=int, default=32, help="of a model as wide as Llama-3-8B")
    given = options.parse_args()
    with torch.device("meta"):  # no memory, no accelerator
        config = LlamaConfig(
            hidden_size=4096, intermediate_size=14336, num_hidden_layers=given.layers,
            num_attention_heads=32, num_key_value_heads=8, vocab_size=128_256,
        )  # fmt: skip
        model = LlamaForCausalLM(config).bfloat16()
    for tokens in (1_048_576, 16_777_216, 67_108_864):
        ids = torch.empty(1, tokens, dtype=torch.long, device="meta")
        try:
            plan = ringfx.plan(
                model, kwargs={"input_ids": ids, "labels": ids, "use_cache": False},
                world_size=64, gpu_memory="80GB", profile="h100-sxm-published",
                optimizer=12,  # bytes of state a parameter: master copy and AdamW's two moments
                shard_states=True,
            )  # fmt: skip
        except OutOfMemory as error:
            print(f"{tokens:,} tokens: {error}\n")
        else:
            print(f"{tokens:,} tokens: " + str(plan).split("\n\n")[0] + "\n")


if __name__ == "__main__":
    main()
