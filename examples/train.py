"""A training script: a byte-level Hugging Face Llama on text that ships with Python.

    torchrun --nproc-per-node 2 -m examples.train --ringfx

With ``--ringfx`` it is one line away from an ordinary script: ``model = ringfx.optimize(model)``.
Every rank still feeds the same whole sequence and reads the same loss. The rest of this file keeps
what happened, for demo.py and benchmarks/memory.py to compare.
"""

from __future__ import annotations

import argparse
import os
import pydoc_data.topics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import ringfx
from examples.peak_memory import extra_bytes


def main() -> None:
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    trained(report=print if is_first else _silent)
    if dist.is_initialized():
        dist.destroy_process_group()


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """What a rank hands back."""

    losses: tuple[float, ...]
    """Of each step, as ``seconds``."""
    seconds: tuple[float, ...]
    extra_bytes: int | None
    """Peak memory of one step beyond what was there before it."""
    gradients: dict[str, torch.Tensor | None]
    """Of each parameter, after the first step."""
    plan: str


def _silent(event: object) -> None:
    """The report of a rank that nobody watches."""


def trained(
    arguments: Sequence[str] | None = None, *, report: Callable[[dict[str, Any]], None] = _silent
) -> Trained:
    """Trains as the command line says; ``report`` hears of each step."""
    options = _options(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)  # every rank starts from the same weights
    stock = LlamaForCausalLM(config())
    model: Callable[..., Any]
    if options.ringfx:
        model = ringfx.optimize(stock, strategy=options.strategy, compiler=options.compiler)
    else:
        model = torch.compile(stock, backend=options.compiler)
    return train(model, stock, options, report)


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


def train(
    model: Callable[..., Any],
    stock: nn.Module,
    options: argparse.Namespace,
    report: Callable[[dict[str, Any]], None],
) -> Trained:
    """``stock`` owns the parameters, whatever calls it."""
    optimizer = torch.optim.AdamW(stock.parameters(), lr=1e-3)
    losses: list[float] = []
    seconds: list[float] = []
    gradients: dict[str, torch.Tensor | None] = {}

    def one_step(step: int) -> float:
        tokens = batch(step, options.seq_len)
        optimizer.zero_grad(set_to_none=False)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        if step == 0:
            gradients.update({name: _copy(p.grad) for name, p in stock.named_parameters()})
        optimizer.step()
        return float(loss.detach())

    report({"event": "started"})
    for step in range(options.steps):
        begin = time.perf_counter()
        losses.append(one_step(step))
        seconds.append(time.perf_counter() - begin)
        report({"event": "step", "step": step, "loss": losses[-1], "seconds": seconds[-1]})
    return Trained(
        losses=tuple(losses),
        seconds=tuple(seconds),
        extra_bytes=extra_bytes(lambda: one_step(options.steps)),
        gradients=gradients,
        plan=str(getattr(model, "plan", "")),
    )


def _copy(grad: torch.Tensor | None) -> torch.Tensor | None:
    return None if grad is None else grad.clone()


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ringfx", action="store_true", help="optimize the model with ringfx")
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--compiler", default="inductor")
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as there are")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
