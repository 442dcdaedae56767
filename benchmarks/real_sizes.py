"""What chunks of tokens and layers again save, and cost: ``python -m benchmarks.real_sizes``.

One training step (AdamW, float32, Inductor) of a Hugging Face Llama of 8 layers, hidden size 512, 8
heads and a vocabulary of 32,000, on two ranks of one thread each:

- ``none``: nothing in chunks; logits and their gradients exist for all tokens;
- ``auto``: the loss in chunks, its logits deferred;
- ``all``: MLPs in chunks too, computed again in backward;
- ``layers``: all layers computed again in backward too, attention apart;
- ``attention``: and their attention;

and beside them what others do, in ringfx's own operators: ``ulysses`` with everything kept;
``ulysses, layers``, which computes all but attention again; ``ring, attention``, which computes
everything again.

Memory is the worst rank's peak beyond what was there before the step, parameters, gradients and
optimizer state included in what was there. Time is the slowest rank's. Settings run in turns, each
time in fresh processes; figures are medians, ratios those within one round.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import ringfx
from benchmarks.memory import _origin as origin
from examples.peak_memory import extra_bytes
from ringfx.comm.local_ranks import LocalRanks

RESULTS = Path(__file__).parent / "results" / "real_sizes.json"
SETTINGS: Mapping[str, Mapping[str, str]] = {
    "none": {"chunks": "none", "recompute": "none"},
    "auto": {"chunks": "auto", "recompute": "none"},
    "all": {"chunks": "all", "recompute": "none"},
    "layers": {"chunks": "all", "recompute": "layers"},
    "attention": {"chunks": "all", "recompute": "attention"},
    "ulysses": {"strategy": "ulysses", "chunks": "none", "recompute": "none"},
    "ulysses, layers": {"strategy": "ulysses", "chunks": "none", "recompute": "layers"},
    "ring, attention": {"strategy": "production", "chunks": "none", "recompute": "attention"},
}
MEMORY_TARGETS = {"auto": 0.45, "all": 0.30, "attention": 0.20}
"""Peak beside that of ``none``."""
TIME_TARGETS = {"auto": 1.05, "all": 1.15, "layers": 1.25}
CONFIG = LlamaConfig(
    hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8,
    num_key_value_heads=8, vocab_size=32_000, max_position_embeddings=1 << 20,
)  # fmt: skip


def step_of(
    levers: Mapping[str, Any], tokens: int, steps: int, vocabulary: int
) -> Mapping[str, Any]:
    """On each rank: seconds of every step after the first, the peak of the last, the losses."""
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIG)
    config.vocab_size = vocabulary
    model = LlamaForCausalLM(config)
    split = ringfx.optimize(model, **levers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    given = torch.randint(vocabulary, (1, tokens))
    losses: list[float] = []
    seconds: list[float] = []

    def step() -> None:
        started = time.perf_counter()
        loss = split(input_ids=given, labels=given, use_cache=False).loss
        loss.backward()
        seconds.append(time.perf_counter() - started)
        losses.append(float(loss.detach()))

    def whole_step() -> None:
        optimizer.zero_grad(set_to_none=False)
        step()
        optimizer.step()

    for _ in range(steps - 1):
        whole_step()
    optimizer.zero_grad(set_to_none=False)
    peak = extra_bytes(step)
    return {"seconds": seconds[1:], "peak": peak, "losses": losses}


def measured(setting: str, tokens: int, steps: int, vocabulary: int) -> Mapping[str, Any]:
    with LocalRanks(2) as ranks:
        found = ranks.run(step_of, SETTINGS[setting], tokens, steps, vocabulary)
    return {
        "setting": setting,
        "seconds": statistics.median(map(max, zip(*(x["seconds"] for x in found), strict=True))),
        "peak": max(x["peak"] for x in found),
        "losses": found[0]["losses"],
    }


def in_turns(
    names: Sequence[str], tokens: int, options: argparse.Namespace, console: Console
) -> list[Mapping[str, Any]]:
    rows = []
    for number in range(options.rounds):
        for i in range(len(names)):
            setting = names[(i + number) % len(names)]
            found = measured(setting, tokens, options.steps, options.vocabulary)
            row = {"round": number, "tokens": tokens, **found}
            console.print(row)
            rows.append(row)
    return rows


def summary(rows: Sequence[Mapping[str, Any]], tokens: int) -> list[dict[str, Any]]:
    """Medians over rounds, and ratios to the first setting within a round."""
    of = {(r["setting"], r["round"]): r for r in rows if r["tokens"] == tokens}
    rounds = sorted({number for _, number in of})
    first = next(name for name, _ in of)
    return [
        {
            "tokens": tokens,
            "setting": setting,
            "bytes_a_token": statistics.median(of[setting, n]["peak"] for n in rounds) / tokens,
            "memory": [of[setting, n]["peak"] / of[first, n]["peak"] for n in rounds],
            "seconds": statistics.median(of[setting, n]["seconds"] for n in rounds),
            "time": [of[setting, n]["seconds"] / of[first, n]["seconds"] for n in rounds],
        }
        for setting in dict.fromkeys(name for name, _ in of)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8_192, 16_384])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=[*SETTINGS])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    vocabulary = "of few words: what is left is not the loss"
    parser.add_argument("--vocabulary", type=int, default=CONFIG.vocab_size, help=vocabulary)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    console = Console()
    rows = [
        row
        for tokens in options.tokens
        for row in in_turns(options.settings, tokens, options, console)
    ]
    figures = [x for tokens in options.tokens for x in summary(rows, tokens)]
    result = {
        "what": "a training step in chunks of tokens, layers computed again; two ranks",
        "targets": {"memory": MEMORY_TARGETS, "time": TIME_TARGETS},
        "vocabulary": options.vocabulary, "figures": figures, "rows": rows, **origin(),
    }  # fmt: skip
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    table = Table(
        "tokens", "setting", "KiB a token and rank", "of the first", "seconds", "of the first"
    )
    for x in figures:
        memory, seconds = (statistics.median(x[key]) for key in ("memory", "time"))
        table.add_row(
            f"{x['tokens']:,}", x["setting"], f"{x['bytes_a_token'] / 1024:.0f}", f"{memory:.2f}",
            f"{x['seconds']:.2f}", f"{seconds:.2f}",
        )  # fmt: skip
    console.print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
