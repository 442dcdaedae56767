"""What checking that ranks agree costs: processor time inside the checks, beside a step's time.

    torchrun --nproc-per-node 2 -m benchmarks.check_time

A difference of 1 % between steps with and without checks drowns in what the machine does from one
minute to the next. So the checks' own processor seconds are taken (waiting for another rank is not
work, and would be done without checks in the next message) and divided by the step's wall time.
The first call of each program compares all parameters; the steps after it are measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaForCausalLM

import ringfx
from benchmarks.memory import _origin as origin
from examples.train import batch, config
from ringfx.compile.rank_agreement import Agreement

RESULTS = Path(__file__).parent / "results" / "check_time.json"
TARGET = 0.01
FIRST_STEPS = 2


class Watched:
    """``Agreement.check`` with its processor seconds added up."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._check = Agreement.check

    def __enter__(self) -> Watched:
        watched = self

        def check(self: Agreement, *args: Any, **kwargs: Any) -> None:
            started = time.thread_time()
            watched._check(self, *args, **kwargs)
            watched.seconds += time.thread_time() - started

        Agreement.check = check  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        Agreement.check = self._check  # type: ignore[method-assign]


def main() -> int:
    options = _options()
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = ringfx.optimize(LlamaForCausalLM(config()), compiler=options.compiler)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    shares, steps = [], []
    with Watched() as watched:
        for step in range(FIRST_STEPS + options.steps):
            tokens = batch(step, options.seq_len)
            before, started = watched.seconds, time.perf_counter()
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds = time.perf_counter() - started
            if step >= FIRST_STEPS:
                steps.append(seconds)
                shares.append((watched.seconds - before) / seconds)
    share = statistics.median(shares)
    if dist.get_rank() == 0:
        result = {
            "what": "processor seconds of the checks over wall seconds of a training step, rank 0",
            "seq_len": options.seq_len,
            "ranks": dist.get_world_size(),
            "compiler": options.compiler,
            "steps": options.steps,
            "median_step_s": round(statistics.median(steps), 4),
            "share": {"median": share, "least": min(shares), "most": max(shares)},
            "target": TARGET,
            **origin(),
        }
        options.output.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(result, indent=1))
    dist.destroy_process_group()
    return int(share > TARGET)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--compiler", default="inductor")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
