"""A training step on 2 ranks x 1 thread against ringfx on 1 rank x 2 threads, and the stock model.

    python -m benchmarks.step_time

The demo's model (examples/train.py) under one compiler, on a machine that nothing else uses. Each
round starts the three settings anew, one after the other, and takes the median step of each after
the first ones, which compile. Reported are the ratios to ringfx on one rank within a round, their
median and their spread over the rounds: what the machine does from one minute to the next is in
both sides of a ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.memory import _origin as origin
from examples.runs import Setting, execute

RESULTS = Path(__file__).parent / "results" / "step_time.json"
TARGET = 1.15
"""Two ranks over one rank with as many threads."""
COMPILING_STEPS = 2
ONE, SPLIT, STOCK = "ringfx, 1 rank", "ringfx split", "stock"


def main() -> int:
    options = _options()
    console = Console()
    rounds = []
    for number in range(options.rounds):
        rounds.append({s.name: _seconds(s) for s in _settings(options)})
        console.print(f"round {number + 1}: {_words(rounds[-1])}")
    ratios = {name: [r[name] / r[ONE] for r in rounds] for name in (SPLIT, STOCK)}
    result = {
        "what": "seconds of a training step",
        "seq_len": options.seq_len,
        "ranks": options.ranks,
        "compiler": options.compiler,
        "strategy": options.strategy,
        "steps": options.steps,
        "rounds": rounds,
        "ratio_to_one_rank": {name: _summary(values) for name, values in ratios.items()},
        "target": TARGET,
        "load_at_the_end": os.getloadavg()[0],
        **origin(),
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    _print(console, rounds, ratios)
    return int(statistics.median(ratios[SPLIT]) > TARGET)


def _settings(options: argparse.Namespace) -> Sequence[Setting]:
    """As many threads in all, so that more ranks have no more cores."""
    steps = options.steps + COMPILING_STEPS
    words = ["--steps", steps, "--seq-len", options.seq_len, "--compiler", options.compiler]
    shared = tuple(map(str, words))
    ringfx = (*shared, "--ringfx", "--strategy", options.strategy)
    return [
        Setting(name=STOCK, ranks=1, threads=options.ranks, arguments=shared),
        Setting(name=ONE, ranks=1, threads=options.ranks, arguments=ringfx),
        Setting(name=SPLIT, ranks=options.ranks, threads=1, arguments=ringfx),
    ]


def _seconds(setting: Setting) -> float:
    with tempfile.TemporaryDirectory(prefix="ringfx-step-") as folder:
        seconds = execute(setting, Path(folder)).seconds
    return statistics.median(seconds[COMPILING_STEPS:])


def _summary(values: Sequence[float]) -> Mapping[str, float]:
    found = {"median": statistics.median(values), "least": min(values), "most": max(values)}
    return {name: round(value, 4) for name, value in found.items()}


def _words(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())


def _print(
    console: Console, rounds: Sequence[Mapping[str, float]], ratios: Mapping[str, Sequence[float]]
) -> None:
    table = Table(title="Seconds of a step, and its ratio to ringfx on one rank")
    for name in ("run", "median s", "ratio", "least", "most"):
        table.add_column(name, justify="left" if name == "run" else "right")
    for name in (STOCK, ONE, SPLIT):
        row: Mapping[str, Any] = _summary(ratios[name]) if name in ratios else {}
        seconds = statistics.median(r[name] for r in rounds)
        table.add_row(name, f"{seconds:.2f}", *(f"{value:.2f}" for value in row.values()))
    console.print(table)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6, help="measured in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compiler", default="inductor")
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
