"""What planning costs: Dynamo's own time, that of tracing, and that of each pass.

A Llama of a given number of layers (the 8B model's shapes, a million tokens) on fake tensors, so
that nothing is computed. Detection and masks together should stay under a tenth of Dynamo's time
and grow linearly with the layers: ``python -m benchmarks.passes --layers 8 16 32``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table
from torch.fx import GraphModule

from ringfx.api import offline
from ringfx.passes.axes import name_axes
from ringfx.passes.axes.rules import find_rule
from ringfx.passes.capture import capture
from ringfx.passes.detect import detect
from ringfx.passes.masks import recover
from ringfx.passes.place import find_lines, place

TARGET = 0.10
"""Detection and masks, as a share of Dynamo's time."""
T = TypeVar("T")


class _Seen(Exception):
    """Ends the call once the passes were timed."""


def main() -> int:
    options = _options()
    _timed(1, options)  # imports and Dynamo's first-use costs are nobody's
    rows = [
        _median([_timed(layers, options) for _ in range(options.repeats)])
        for layers in options.layers
    ]
    share = max(row["share of Dynamo"] for row in rows)
    result = {
        "what": "seconds of one processor to plan a Llama on fake tensors, by pass",
        "seq_len": options.seq_len,
        "repeats": options.repeats,
        "rows": rows,
        "target": TARGET,
        **_origin(),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    _print(rows)
    return 0 if share <= TARGET else 1


def _timed(layers: int, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of each step for one model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with offline():
        config = LlamaConfig(
            num_hidden_layers=layers, hidden_size=4096, intermediate_size=14336,
            num_attention_heads=32, num_key_value_heads=8, vocab_size=128256,
            max_position_embeddings=options.seq_len, use_cache=False,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        ids = torch.zeros(1, options.seq_len, dtype=torch.int64)
        found: dict[str, float] = {"layers": layers}
        torch._dynamo.reset()
        started = time.process_time()

        def backend(gm: GraphModule, inputs: Sequence[Any]) -> Any:
            found["Dynamo"] = time.process_time() - started
            _time_passes(gm, inputs, found, layers)
            raise _Seen

        try:
            torch.compile(model, backend=backend, dynamic=False)(input_ids=ids)
        except torch._dynamo.exc.BackendCompilerFailed as failure:
            if not isinstance(failure.inner_exception, _Seen):
                raise
        finally:
            torch._dynamo.reset()
    found["share of Dynamo"] = (found["detect"] + found["masks"]) / found["Dynamo"]
    return found


def _time_passes(
    gm: GraphModule, inputs: Sequence[Any], found: dict[str, float], layers: int
) -> None:
    def step(name: str, run: Callable[[], T]) -> T:
        started = time.process_time()
        result = run()
        found[name] = time.process_time() - started
        return result

    captured = step("capture (make_fx)", lambda: capture(gm, inputs, known=find_rule))
    detected = step("detect", lambda: detect(captured))
    sites = step("masks", lambda: recover(captured, detected))
    assert len(sites.found) == layers, f"{len(sites.found)} of {layers} attentions found"
    graph = captured.graph_module.graph
    axes = step("axes", lambda: name_axes(graph))
    lines = step("lines", lambda: find_lines(graph, axes, sites.found, 8))
    step("place", lambda: place(graph, lines))


def _median(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(run[name] for run in runs), 4) for name in runs[0]}


def _print(rows: Sequence[Mapping[str, float]]) -> None:
    table = Table(title="seconds of one processor")
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(f"{value:g}" for value in row.values()))
    Console().print(table)


def _origin() -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} processors",
        "torch": metadata.version("torch"),
        "transformers": metadata.version("transformers"),
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--seq-len", type=int, default=1 << 20)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/passes.json"))
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
