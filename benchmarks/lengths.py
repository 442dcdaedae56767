"""One program for many lengths: ``python -m benchmarks.lengths``.

A Hugging Face Llama (2 layers, hidden size 64, vocabulary 1,000) takes a training step at each of
100 lengths between 1,000 and 16,000 tokens, drawn with a fixed seed, on two ranks of one thread
each with ``ringfx.optimize(model, dynamic=True)``. Counted are the programs that were compiled, and
the seconds until each length was ready. At every fifth length the loss and all gradients are
compared with those of the unsplit model. Then steps of the shared program and of one made for that
length alone run in turns, at some lengths.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

import ringfx
from benchmarks.memory import _origin as origin
from ringfx.comm.local_ranks import LocalRanks

RESULTS = Path(__file__).parent / "results" / "lengths.json"
MOST_PROGRAMS, TIME_TARGET = 4, 1.05
SHORTEST, LONGEST = 1_000, 16_000
RANKS = 2
CONFIG = LlamaConfig(
    hidden_size=64, intermediate_size=172, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, vocab_size=1_000, max_position_embeddings=LONGEST,
)  # fmt: skip


def steps_of_lengths(lengths: Sequence[int], compared: int) -> Mapping[str, Any]:
    """On each rank: programs, the first step of each length, and how far from the unsplit model."""
    stock, mine, model = _models(dynamic=True)
    first, worst_loss, worst_gradient = [], 0.0, 0.0
    for number, length in enumerate(lengths):
        first.append(_step(mine, model, length))
        if number % compared == 0:
            mine.zero_grad()
            ours = _loss(model, length)
            ours.backward()
            stock.zero_grad()
            loss = _loss(stock, length)
            loss.backward()
            worst_loss = max(worst_loss, float((ours - loss).abs() / loss.abs()))
            worst_gradient = max(worst_gradient, _gradients(mine, stock))
    return {
        "programs": model._ringfx_shared.backend.compilations,  # type: ignore[attr-defined]
        "first_steps_s": first,
        "loss": worst_loss,
        "gradients": worst_gradient,
    }


def in_turns(lengths: Sequence[int], rounds: int) -> Mapping[str, Any]:
    """On each rank: seconds of a step by the shared program and by one of that length's own."""
    _, shared, by_shared = _models(dynamic=True)
    for length in lengths:
        _step(shared, by_shared, length)
    found: dict[str, Any] = {}
    for length in lengths:
        _, own, by_own = _models(dynamic=False)
        both = {"shared": (shared, by_shared), "own": (own, by_own)}
        seconds: dict[str, list[float]] = {name: [] for name in both}
        for number in range(rounds + 1):
            for name in list(both) if number % 2 else list(both)[::-1]:
                taken = _step(*both[name], length)
                if number:
                    seconds[name].append(taken)
        found[str(length)] = seconds
    return found


def _models(dynamic: bool) -> tuple[LlamaForCausalLM, LlamaForCausalLM, torch.nn.Module]:
    """Unsplit, the model that is split, and what calls it."""
    torch.manual_seed(0)
    stock = LlamaForCausalLM(CONFIG)
    mine = copy.deepcopy(stock)
    return stock, mine, ringfx.optimize(mine, dynamic=dynamic)


def _loss(model: torch.nn.Module, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    given = torch.randint(CONFIG.vocab_size, (1, length), generator=generator)
    loss: torch.Tensor = model(input_ids=given, labels=given, use_cache=False).loss
    return loss


def _step(owner: torch.nn.Module, call: torch.nn.Module, length: int) -> float:
    owner.zero_grad()
    torch.distributed.barrier()
    started = time.perf_counter()
    _loss(call, length).backward()
    torch.distributed.barrier()
    return time.perf_counter() - started


def _gradients(mine: torch.nn.Module, stock: torch.nn.Module) -> float:
    pairs = zip(mine.parameters(), stock.parameters(), strict=True)
    return max(float((a.grad - b.grad).abs().max() / b.grad.abs().max()) for a, b in pairs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, default=100)
    parser.add_argument("--compared", type=int, default=5, help="every so many lengths")
    parser.add_argument("--timed", type=int, nargs="*", default=[1_237, 4_096, 8_001, 15_870])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    lengths = random.Random(0).sample(range(SHORTEST, LONGEST + 1), options.lengths)
    with LocalRanks(RANKS) as ranks:
        every = ranks.run(steps_of_lengths, lengths, options.compared)
        timed = ranks.run(in_turns, options.timed, options.rounds)
    first = [max(x) for x in zip(*(f["first_steps_s"] for f in every), strict=True)]
    times = {
        length: {name: [max(x) for x in zip(*(t[length][name] for t in timed), strict=True)]
                 for name in timed[0][length]}
        for length in timed[0]
    }  # fmt: skip
    result = {
        "what": "one program for many lengths, two ranks, beside a program of each length's own",
        "lengths": lengths,
        "programs": max(f["programs"] for f in every),
        "first_step_s": first,
        "largest_difference": {x: max(f[x] for f in every) for x in ("loss", "gradients")},
        "seconds": times,
        "targets": {"programs": MOST_PROGRAMS, "time": TIME_TARGET}, **origin(),
    }  # fmt: skip
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    console = Console()
    console.print(
        f"{len(lengths)} lengths, {result['programs']} programs (at most {MOST_PROGRAMS}); first "
        f"step of a length: median {statistics.median(first):.1f} s; "
        f"differences {result['largest_difference']}"
    )
    for length, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds["shared"], seconds["own"], strict=True)]
        console.print(
            f"{length} tokens: {statistics.median(seconds['shared']):.2f} s, "
            f"{statistics.median(ratios):.2f} of its own program's "
            f"({min(ratios):.2f} to {max(ratios):.2f}; at most {TIME_TARGET})"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
