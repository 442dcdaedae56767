"""A training script: a byte-level Hugging Face Llama on text that ships with Python.

    torchrun --nproc-per-node 2 -m examples.train --ringfx --report reports

With ``--ringfx`` it is one line away from an ordinary script: ``model = ringfx.optimize(model)``.
Every rank still feeds the same whole sequence and reads the same loss. The rest of this file writes
down what happened, for demo.py and benchmarks/memory.py to compare.
"""

from __future__ import annotations

import argparse
import json
import os
import pydoc_data.topics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import ringfx
from examples.peak_memory import extra_bytes


def main() -> None:
    options = _options()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)  # every rank starts from the same weights
    stock = LlamaForCausalLM(config())
    model: Callable[..., Any]
    if options.ringfx:
        model = ringfx.optimize(stock, strategy=options.strategy, compiler=options.compiler)
    else:
        model = torch.compile(stock, backend=options.compiler)
    rank = dist.get_rank() if dist.is_initialized() else 0
    options.report.mkdir(parents=True, exist_ok=True)
    with (options.report / f"rank{rank}.jsonl").open("w") as lines:
        report = Report(lines, stock, options.report / f"gradients{rank}.pt")
        train(model, options, report)
    if dist.is_initialized():
        dist.destroy_process_group()


def config() -> Any:
    """4 layers, hidden 256, 8 heads of which 4 for keys and values, one token a byte."""
    return LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1 << 20,
        use_cache=False,
    )


def batch(step: int, seq_len: int) -> torch.Tensor:
    """The step's stretch of Python's own language reference, as bytes: int64 [1, seq_len]."""
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    tokens = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    start = step * seq_len % (len(tokens) - seq_len)
    return tokens[start : start + seq_len][None]


@dataclass(frozen=True, eq=False)
class Report:
    """What a rank tells: one JSON object a line, and the first step's gradients."""

    lines: TextIO
    stock: nn.Module
    """The model that owns the parameters, whatever calls it."""
    gradients: Path

    def write(self, event: str, **values: Any) -> None:
        self.lines.write(json.dumps({"event": event, **values}) + "\n")
        self.lines.flush()

    def save_gradients(self) -> None:
        torch.save({name: p.grad for name, p in self.stock.named_parameters()}, self.gradients)


def train(model: Callable[..., Any], options: argparse.Namespace, report: Report) -> None:
    optimizer = torch.optim.AdamW(report.stock.parameters(), lr=1e-3)

    def one_step(step: int) -> float:
        tokens = batch(step, options.seq_len)
        optimizer.zero_grad(set_to_none=False)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        if step == 0:
            report.save_gradients()
        optimizer.step()
        return float(loss.detach())

    report.write("started")
    for step in range(options.steps):
        begin = time.perf_counter()
        loss = one_step(step)
        report.write("step", step=step, loss=loss, seconds=time.perf_counter() - begin)
    report.write("plan", text=str(getattr(model, "plan", "")))
    report.write("memory", bytes=extra_bytes(lambda: one_step(options.steps)))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ringfx", action="store_true", help="optimize the model with ringfx")
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--compiler", default="inductor")
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
