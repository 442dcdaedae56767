"""What ringfx's own passes cost: ``python -m benchmarks.passes``.

Two questions, both asked of the whole journey in ``ringfx/compile/pipeline.py``:

- planning a Llama (the 8B model's shapes) of 4 to 80 layers at a million tokens for 1,024 ranks on
  fake tensors, sdpa and eager: seconds of each pass, whether they grow linearly with layers, and
  what share of Dynamo's time detection and masks take;
- training the demo's model on two ranks of one processor each under Inductor, as it is and with
  states sharded and wide parts in chunks: all passes of a rank as a share of what Dynamo and
  Inductor take there from an empty cache.

With ``--levers`` states are sharded, tokens in chunks, layers computed again and offloaded too.

Planning counts seconds of one processor, the demo wall time of both sides. A time is linear if the
most layers take at most ``MOST_GROWTH`` times as long a layer as twenty do.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import ringfx
from benchmarks.memory import _origin as origin
from ringfx.api import offline
from ringfx.comm.local_ranks import LocalRanks
from ringfx.compile import pipeline
from ringfx.passes import steps

Clock = Callable[[], float]
RESULTS = Path(__file__).parent / "results" / "passes.json"
MOST_SHARE = 0.20
"""All passes, as a share of the time of Dynamo and Inductor for the demo's model."""
LEVERS: Mapping[str, Any] = {
    "shard_states": True, "chunks": 512, "recompute": "layers", "offload": "all",
}  # fmt: skip
"""Of the demo; plans choose their chunks."""
MOST_SECONDS = 60.0
"""All passes for the largest model."""
MOST_DETECTION = 0.10
"""Detection, masks and the independent estimate, as a share of Dynamo's time for the same model."""
MOST_GROWTH = 1.3
"""Seconds a layer of the largest model over those of the smallest that is not dominated by what
does not depend on layers at all."""
PASSES = {
    "capture_parts": "capture", "detect": "detect", "recover": "masks", "missed": "estimate",
    "name_axes": "axes", "find_lines": "lines", "normalize": "normalize",
    "end_landmarks": "normalize", "separate_columns": "normalize", "insert_turns": "normalize",
    "insert_reshards": "normalize", "told_as_written": "by rows", "place": "place",
    "choose": "choose", "step_in_chunks": "memory", "alive_over": "memory",
    "rewrite": "rewrite", "verify": "verify",
    "find_regions": "regions", "all_sized": "sizes", "run_in_chunks": "chunks", "_digest": "digest",
}  # fmt: skip
"""Functions of ``ringfx.compile.pipeline`` and ``ringfx.passes.steps`` -> the name of the pass."""


def main() -> int:
    options = _options()
    if options.demo_only:
        with LocalRanks(2) as ranks:
            levers = LEVERS if options.levers else {}
            print(json.dumps(ranks.run(_demo, options.demo_tokens, levers)[0]))
        return 0
    rows = [
        _planned(layers, attention, options)
        for attention in options.attention
        for layers in options.layers
    ]
    tokens = options.demo_tokens
    demos = {
        name: _demo_in_a_process(tokens, more)
        for name, more in {"plain": (), "levers": ("--levers",)}.items()
        if tokens
    }
    result = {
        "what": "seconds of one processor in ringfx's passes",
        "planning": {"tokens": options.seq_len, "ranks": options.world_size, "rows": rows},
        "levers": options.levers,
        "demo": demos,
        "limits": {
            "seconds": MOST_SECONDS,
            "share": MOST_SHARE,
            "growth": MOST_GROWTH,
            "detection": MOST_DETECTION,
        },
        **origin(),
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    _print(rows, demos)
    missed = _missed(rows, demos)
    for text in missed:
        print(f"MISSED: {text}")
    return int(bool(missed))


def _missed(rows: Sequence[Mapping[str, Any]], demos: Mapping[str, Any]) -> list[str]:
    """The limits that were not kept, in words."""
    texts = [
        f"{row['layers']} layers, {row['attention']}: {row['passes']} s"
        for row in rows
        if row["passes"] > MOST_SECONDS
    ]
    texts += [
        f"{row['layers']} layers, {row['attention']}: {row['detection share']:.0%} in detection"
        for row in rows
        if row["detection share"] > MOST_DETECTION
    ]
    for attention in {row["attention"] for row in rows}:
        alike = sorted((r for r in rows if r["attention"] == attention), key=lambda r: r["layers"])
        known = [r["passes"] / r["layers"] for r in alike if r["layers"] >= 20]
        if len(known) > 1 and known[-1] > MOST_GROWTH * known[0]:
            texts.append(f"{attention}: {known[0]:.4f} s a layer becomes {known[-1]:.4f} s")
    return texts + [
        f"{name}: {demo['share']:.0%} of Dynamo and Inductor"
        for name, demo in demos.items()
        if demo["share"] > MOST_SHARE
    ]


@contextlib.contextmanager
def timed_passes(clock: Clock) -> Iterator[dict[str, float]]:
    """Seconds in each pass of all programs lowered meanwhile, and in all passes."""
    found: dict[str, float] = {}
    owners = {name: pipeline if hasattr(pipeline, name) else steps for name in PASSES}
    before = {name: getattr(owner, name) for name, owner in owners.items()}
    for name, function in before.items():
        setattr(owners[name], name, _timed(function, PASSES[name], found, clock))
    try:
        yield found
    finally:
        for name, function in before.items():
            setattr(owners[name], name, function)
        found["passes"] = sum(found.values())


def _timed(
    function: Callable[..., Any], name: str, found: dict[str, float], clock: Clock
) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        started = clock()
        try:
            return function(*args, **kwargs)
        finally:
            found[name] = found.get(name, 0.0) + clock() - started

    return timed


def _planned(layers: int, attention: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each step of planning one model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with offline():
        make: Any = LlamaConfig
        config = make(
            num_hidden_layers=layers, hidden_size=4096, intermediate_size=14336,
            num_attention_heads=32, num_key_value_heads=8, vocab_size=128256,
            max_position_embeddings=options.seq_len, use_cache=False,
            attn_implementation=attention,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        ids = torch.zeros(1, options.seq_len, dtype=torch.int64)
    with timed_passes(time.process_time) as found:
        started = time.process_time()
        plan = ringfx.plan(
            model, kwargs={"input_ids": ids, "labels": ids}, world_size=options.world_size,
            gpu_memory=int(1e15), profile="h100-sxm-published", shard_states=options.levers,
            chunks="auto" if options.levers else "none",
            recompute="layers" if options.levers else "none",
            offload="all" if options.levers else "none",
        )  # fmt: skip
        whole = time.process_time() - started
    assert len(plan.layers) == layers, plan
    dynamo = whole - found["passes"]
    detection = sum(found[name] for name in ("detect", "masks", "estimate"))
    row = {
        "layers": layers, "attention": attention, "Dynamo": dynamo, **found,
        "detection share": detection / dynamo,
    }  # fmt: skip
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}


def _demo_in_a_process(tokens: int, more: Sequence[str]) -> dict[str, Any]:
    """The demo's share, compiled from an empty cache."""
    with tempfile.TemporaryDirectory(prefix="ringfx-inductor-") as cache:
        command = [sys.executable, "-m", "benchmarks.passes", "--demo-only"]
        done = subprocess.run(
            [*command, "--demo-tokens", str(tokens), *more],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _demo(tokens: int, levers: Mapping[str, Any]) -> dict[str, Any]:
    """One training step of the demo's model compiled on rank 0 of two."""
    from transformers import LlamaForCausalLM

    from examples.train import batch, config

    torch.manual_seed(0)
    model = ringfx.optimize(LlamaForCausalLM(config()), strategy="production", **levers)
    ids = batch(0, tokens)

    def step() -> float:
        started = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        return time.perf_counter() - started

    with timed_passes(time.perf_counter) as found:
        first = step()
    compilers = first - min(step() for _ in range(2)) - found["passes"]
    named = {name: round(seconds, 3) for name, seconds in found.items()}
    return {
        "tokens": tokens,
        "Dynamo and Inductor": round(compilers, 3),
        "share": round(found["passes"] / compilers, 4),
        **named,
    }


def _print(rows: Sequence[Mapping[str, Any]], demos: Mapping[str, Any]) -> None:
    table = Table(title="seconds of one processor")
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(f"{v:g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=180).print(table)
    for name, demo in demos.items():
        print(f"demo, {name}: {demo}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 20, 32, 80])
    parser.add_argument("--attention", nargs="+", default=["sdpa", "eager"])
    parser.add_argument("--seq-len", type=int, default=1 << 20)
    parser.add_argument("--world-size", type=int, default=1024)
    parser.add_argument("--demo-tokens", type=int, default=2048, help="0: leave the demo out")
    parser.add_argument("--levers", action="store_true", help="all at once")
    parser.add_argument("--demo-only", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
