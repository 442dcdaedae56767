"""Plans for many budgets, run: ``python -m benchmarks.budgets PROFILE``.

A training step of a Llama (four layers, two ranks of one thread, float32) under budgets from the
least that any plan meets up to what is needed without one. Each budget's plan is run: does it keep
to the budget, and is another combination that keeps to it faster? Combinations that are run beside
them: everything kept, all layers again, their attention too, each with and without chunks.

The profile is one that ``ringfx calibrate`` wrote on this machine. Memory is the worst rank's
largest sum of tensors that torch allocated in a step, parameters, gradients and optimizer state
with it (``benchmarks.prediction_memory``); time the median of the slowest rank's steps. Plans that
choose the same are run once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import ringfx
from benchmarks.memory import _origin as origin
from benchmarks.prediction_memory import peak_bytes
from ringfx.comm.local_ranks import LocalRanks
from ringfx.ir.plan import Plan
from ringfx.strategies.buffer_pool import POOL

RESULTS = Path(__file__).parent / "results" / "budgets.json"
TARGETS = {"over the budget": 0, "mean beside the best": 1.05, "worst beside the best": 1.15}
BUDGETS = 20
FIXED: Mapping[str, Mapping[str, Any]] = {
    f"recompute {recompute}, chunks {chunks}": {"recompute": recompute, "chunks": chunks}
    for recompute in ("none", "layers", "attention")
    for chunks in ("none", "all")
}
CONFIG = LlamaConfig(
    hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=4, vocab_size=4096, max_position_embeddings=1 << 20,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Ran:
    """A combination, run."""

    options: Mapping[str, Any]
    choice: str
    predicted_bytes: int
    measured_bytes: int
    predicted_ms: float
    measured_ms: float


def planned(
    options: Mapping[str, Any], tokens: int, profile: str, config: LlamaConfig = CONFIG
) -> Plan:
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        given = torch.empty(1, tokens, dtype=torch.int64)
    return ringfx.plan(
        model, (), {"input_ids": given, "labels": given, "use_cache": False}, world_size=2,
        profile=profile, optimizer="adamw", **options,
    )  # fmt: skip


def choice_of(plan: Plan) -> str:
    """What is chosen, in words: equal for equal programs."""
    layers = [
        f"{x.strategy}{x.head_groups or ''}{' again' * x.recomputed}{' attn' * x.attention_again}"
        for x in plan.layers
    ]
    chunks = sorted(f"{x.name} {x.tokens}" for x in plan.chunks)
    return "; ".join([*layers, *chunks])


def measure(
    options: Mapping[str, Any], tokens: int, profile: str, steps: int, config: LlamaConfig
) -> Any:
    """On each rank: milliseconds of steps, the peak of another one, and the plan."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    split = ringfx.optimize(model, profile=profile, optimizer="adamw", **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    given = torch.randint(config.vocab_size, (1, tokens))

    def step() -> None:
        split(input_ids=given, labels=given, use_cache=False).loss.backward()

    took = []
    for _ in range(steps + 1):
        started = time.perf_counter()
        step()
        optimizer.step()
        optimizer.zero_grad()
        took.append(1e3 * (time.perf_counter() - started))
    POOL.clear()
    there = sum(p.numel() * p.element_size() for p in model.parameters())
    there += sum(
        x.numel() * x.element_size() for state in optimizer.state.values() for x in state.values()
    )
    return took[1:], there + peak_bytes(step), getattr(split, "plan").to_json()  # noqa: B009


def ran(
    options: Mapping[str, Any], tokens: int, profile: str, steps: int,
    config: LlamaConfig = CONFIG,
) -> Ran:  # fmt: skip
    with LocalRanks(2) as ranks:
        found = ranks.run(measure, options, tokens, profile, steps, config)
    plan = Plan.from_json(found[0][2])
    slowest = [max(times) for times in zip(*(times for times, _, _ in found), strict=True)]
    return Ran(
        options=dict(options), choice=choice_of(plan), predicted_bytes=plan.memory.peak_bytes,
        measured_bytes=max(peak for _, peak, _ in found), predicted_ms=plan.step_ms or 0.0,
        measured_ms=statistics.median(slowest),
    )  # fmt: skip


def budgets_of(tokens: int, profile: str) -> Sequence[int]:
    plans = [planned(options, tokens, profile).memory.peak_bytes for options in FIXED.values()]
    least, most = 1.001 * min(plans), max(plans)
    return [round(least + i * (most - least) / (BUDGETS - 1)) for i in range(BUDGETS)]


def rows_of(budgets: Sequence[int], of_budget: Mapping[int, Ran], every: Sequence[Ran]) -> Any:
    rows = []
    for budget in budgets:
        mine = of_budget[budget]
        fitting = [x.measured_ms for x in every if x.measured_bytes <= budget]
        rows.append(
            {
                "budget": budget,
                "measured_bytes": mine.measured_bytes,
                "of_budget": mine.measured_bytes / budget,
                "measured_ms": mine.measured_ms,
                "beside_best": mine.measured_ms / min(fitting) if fitting else None,
                "memory_error": mine.predicted_bytes / mine.measured_bytes - 1,
                "time_error": mine.predicted_ms / mine.measured_ms - 1,
                "choice": mine.choice,
            }
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("profile")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    console = Console(width=160)
    budgets = budgets_of(options.tokens, options.profile)
    known: dict[str, Ran] = {}

    def run(setting: Mapping[str, Any]) -> Ran:
        choice = choice_of(planned(setting, options.tokens, options.profile))
        if choice not in known:
            known[choice] = ran(setting, options.tokens, options.profile, options.steps)
            console.print(known[choice])
        return known[choice]

    of_budget = {budget: run({"gpu_memory": budget}) for budget in budgets}
    for setting in FIXED.values():
        run(setting)
    rows = rows_of(budgets, of_budget, [*known.values()])
    beside = [row["beside_best"] for row in rows if row["beside_best"]]
    errors = [abs(x.predicted_bytes / x.measured_bytes - 1) for x in known.values()]
    summary = {
        "budgets": len(rows), "combinations": len(known),
        "over the budget": sum(row["of_budget"] > 1 for row in rows),
        "mean beside the best": statistics.mean(beside), "worst beside the best": max(beside),
        "median error of memory": statistics.median(errors), "worst error of memory": max(errors),
    }  # fmt: skip
    result = {
        "what": "plans for many budgets, run", "targets": TARGETS, "tokens": options.tokens,
        "summary": summary, "rows": rows, "combinations": [vars(x) for x in known.values()],
        **origin(),
    }  # fmt: skip
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    table = Table("budget MiB", "measured", "of it", "ms", "beside the best")
    for row in rows:
        table.add_row(
            f"{row['budget'] / 2**20:.0f}", f"{row['measured_bytes'] / 2**20:.0f}",
            f"{row['of_budget']:.2f}", f"{row['measured_ms']:.0f}",
            f"{row['beside_best'] or 0:.2f}",
        )  # fmt: skip
    console.print(table, summary)
    return int(any(summary[what] > most for what, most in TARGETS.items()))


if __name__ == "__main__":
    raise SystemExit(main())
