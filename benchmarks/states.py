"""States sharded by ringfx and by FSDP2: ``python -m benchmarks.states``.

The same Hugging Face Llama (8 layers, hidden size 512, vocabulary 32,000, AdamW, float32) on the
same two ranks of one thread each: ``ringfx.optimize(shard_states=True)``, and ``fully_shard`` of
each layer and the root. Compared are the bytes of parameters, gradients and optimizer state of a
rank, and the time of forward and backward of so few tokens that gathers and reduce-scatters are
most of it. Each rank of FSDP2 computes as many tokens as one of ringfx's. Steps run in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM

import ringfx
from benchmarks.memory import _origin as origin
from benchmarks.real_sizes import CONFIG
from ringfx.comm.local_ranks import LocalRanks

RESULTS = Path(__file__).parent / "results" / "states.json"
BYTES_TARGET, TIME_TARGET = 1.02, 1.1
RANKS = 2


def by_ringfx() -> tuple[torch.nn.Module, torch.nn.Module, int]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    return model, ringfx.optimize(model, shard_states=True, strategy="collective"), RANKS


def by_fsdp() -> tuple[torch.nn.Module, torch.nn.Module, int]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model, model, 1


def in_turns(tokens: int, rounds: int) -> Mapping[str, Any]:
    """On each rank: seconds of forward and backward by both, and bytes of their states."""
    made = {"ringfx": by_ringfx(), "fsdp": by_fsdp()}
    steps = {name: _step(model, call, tokens * many) for name, (model, call, many) in made.items()}
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for number in range(rounds + 2):
        for name in list(steps) if number % 2 else list(steps)[::-1]:
            taken = steps[name]()
            if number >= 2:
                seconds[name].append(taken)
    return {name: {"seconds": seconds[name], "bytes": _bytes(made[name][0])} for name in made}


def _step(model: torch.nn.Module, call: torch.nn.Module, tokens: int) -> Callable[[], float]:
    given = torch.randint(CONFIG.vocab_size, (1, tokens))

    def step() -> float:
        model.zero_grad()
        torch.distributed.barrier()
        started = time.perf_counter()
        call(input_ids=given, labels=given, use_cache=False).loss.backward()
        torch.distributed.barrier()
        return time.perf_counter() - started

    return step


def _bytes(model: torch.nn.Module) -> int:
    """Of parameters, gradients and AdamW's state on this rank."""
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    tensors = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]
    tensors += [v for s in optimizer.state.values() for v in s.values() if v.dim()]
    local = [x.to_local() if isinstance(x, DTensor) else x for x in tensors]
    return sum(x.numel() * x.element_size() for x in local)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=32, help="of each rank")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    with LocalRanks(RANKS) as ranks:
        found = ranks.run(in_turns, options.tokens, options.rounds)
    worst = {name: max(x[name]["bytes"] for x in found) for name in found[0]}
    seconds = {
        name: [max(x) for x in zip(*(f[name]["seconds"] for f in found), strict=True)]
        for name in found[0]
    }
    ratios = [a / b for a, b in zip(seconds["ringfx"], seconds["fsdp"], strict=True)]
    result = {
        "what": "states sharded over two ranks, by ringfx and by FSDP2",
        "tokens_a_rank": options.tokens, "bytes": worst, "seconds": seconds,
        "targets": {"bytes": BYTES_TARGET, "time": TIME_TARGET}, **origin(),
    }  # fmt: skip
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    console = Console()
    console.print(
        f"bytes {worst['ringfx']:,} and {worst['fsdp']:,}: {worst['ringfx'] / worst['fsdp']:.3f}"
    )
    console.print(
        f"seconds {statistics.median(seconds['ringfx']):.3f} and "
        f"{statistics.median(seconds['fsdp']):.3f}: {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f})"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
