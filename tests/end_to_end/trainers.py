"""Steps of accelerate and of Trainer in bfloat16 over a split model, to be started by torchrun.

``python -m torch.distributed.run ... -m tests.end_to_end.trainers FOLDER``: every rank writes into
FOLDER what it saw, as ``rank0.json``.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import ringfx

STEPS = 3
RATE = 1e-2
OPTIONS: dict[str, Any] = {"compiler": "eager"}


def model() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    found: nn.Module = LlamaForCausalLM(config)
    return found


def tokens() -> torch.Tensor:
    return torch.randint(0, 128, (1, 47), generator=torch.Generator().manual_seed(1))


def unsplit() -> list[float]:
    """The losses of the same recipe on one process."""
    stock, ids, losses = model(), tokens(), []
    optimizer = torch.optim.SGD(stock.parameters(), lr=RATE)
    for _ in range(STEPS):
        with torch.autocast("cpu", torch.bfloat16):
            loss = stock(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(stock.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def by_accelerate(optimize_first: bool) -> list[float]:
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    trained: Any = model()
    optimizer: Any = torch.optim.SGD(trained.parameters(), lr=RATE)
    if optimize_first:
        trained, optimizer = accelerator.prepare(ringfx.optimize(trained, **OPTIONS), optimizer)
    else:
        trained, optimizer = accelerator.prepare(trained, optimizer)
        trained = ringfx.optimize(trained, **OPTIONS)
    ids, losses = tokens(), []
    for _ in range(STEPS):
        with accelerator.accumulate(trained):
            output = trained(input_ids=ids, labels=ids, use_cache=False)
            accelerator.backward(output.loss)
            accelerator.clip_grad_norm_(trained.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        assert type(output.logits).__name__ == "SplitTensor", type(output.logits)
        losses.append(output.loss.item())
    return losses


def by_trainer(folder: Path, checkpointing: bool) -> list[float]:
    ids = tokens()[0]
    arguments = TrainingArguments(
        output_dir=str(folder / os.environ["RANK"]),
        bf16=True,
        use_cpu=True,
        max_steps=STEPS,
        per_device_train_batch_size=1,
        logging_steps=1,
        logging_nan_inf_filter=False,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        optim="sgd",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=checkpointing,
    )
    examples: Any = [{"input_ids": ids, "labels": ids}] * 2 * STEPS
    optimized = ringfx.optimize(copy.deepcopy(model()), **OPTIONS)
    trainer = Trainer(optimized, arguments, train_dataset=examples)
    trainer.train()
    assert isinstance(optimized.plan, ringfx.Plan), optimized.plan
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    found = {
        "unsplit": unsplit(),
        "accelerate, optimized before": by_accelerate(optimize_first=True),
        "accelerate, optimized after": by_accelerate(optimize_first=False),
        "Trainer": by_trainer(folder, checkpointing=False),
        "Trainer with gradient checkpointing": by_trainer(folder, checkpointing=True),
    }
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
