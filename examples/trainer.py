"""transformers' Trainer over a split sequence: one line more than its own tutorial.

python -m examples.trainer                              one process, as ever
torchrun --nproc-per-node 2 -m examples.trainer         the same numbers, sequences over two
torchrun --nproc-per-node 4 -m examples.trainer --sequence-ranks 2
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import ringfx.integrations.transformers


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m examples.trainer")
    options.add_argument("--sequence-ranks", type=int, help="ranks that share a sequence: all")
    options.add_argument("--bf16", action="store_true", help="autocast")
    options.add_argument("--compiler", default="inductor", help="inductor, aot_eager or eager")
    given = options.parse_args()

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2,
        )
    )  # fmt: skip
    text = torch.arange(32 * 301).view(32, 301) * 7 % 251
    data = [{"input_ids": row, "labels": row} for row in text]
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(), max_steps=5, per_device_train_batch_size=2, use_cpu=True,
        gradient_accumulation_steps=2, learning_rate=3e-3, logging_steps=1, report_to=[],
        save_strategy="no", disable_tqdm=True, bf16=given.bf16,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer = ringfx.integrations.transformers.prepare(  # the line
        trainer, sequence_ranks=given.sequence_ranks, compiler=given.compiler
    )
    trainer.train()
    if trainer.is_world_process_zero():
        losses = [x["loss"] for x in trainer.state.log_history if "loss" in x]
        print("loss", " ".join(f"{loss:.4f}" for loss in losses))


if __name__ == "__main__":
    main()
