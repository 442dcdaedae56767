"""``python -m tests.corpus.levers``: the corpus under each lever of memory, and under all of them.

Three steps of an optimizer each, on ranks that trace for themselves: parameters become DTensors
before a model is traced, so ranks cannot be forked in the middle as in ``forked.py``. In float64,
since after some steps a ReLU's argument lies within float32's rounding of zero sooner or later.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import json
import platform
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ringfx.errors import CommunicationError
from tests.corpus.measure import Outcome, Setup, compiled_whole, has_numbers, measure
from tests.corpus.report import Record, source
from tests.corpus.table import VARIANTS
from tests.support.ranks import RankPool

__all__ = ["LEVERS", "main"]

LEVERS: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "chunks": {"chunks": 3},
    "states": {"shard_states": True},
    "recompute": {"recompute": "layers"},
    "offload": {"recompute": "attention", "offload": "all"},
    "all": {"chunks": 3, "shard_states": True, "recompute": "layers"},
}
"""Options of ``ringfx.optimize`` by name."""
WRONG = "WRONG"
NEITHER = "refused by torch.compile itself"
OWN_TYPE = ("fsmt/*", "nllb_moe/*", "switch_transformers/*")
"""Not in float64: the unsplit model fails there, or converts its own weights."""
LIMIT_S = 400.0
"""Inductor's compiler takes most of it where four ranks share two cores."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    part, parts = options.part
    names = [
        v.name
        for v in VARIANTS
        if not v.autocast
        and (not options.only or any(fnmatch.fnmatch(v.name, pattern) for pattern in options.only))
    ][part - 1 :: parts]
    every: list[dict[str, Any]] = []
    for ranks in options.ranks:
        pool = RankPool(ranks, timeout_s=LIMIT_S, collective_timeout_s=LIMIT_S / 2)
        for lever in options.levers:
            for number, name in enumerate(names, 1):
                own_type = any(fnmatch.fnmatch(name, pattern) for pattern in OWN_TYPE)
                setup = Setup(
                    options=LEVERS[lever], compiler=options.compiler, steps=options.steps,
                    dtype=None if own_type else "float64",
                )  # fmt: skip
                record = examine(pool, name, setup)
                print(f"[{lever}, p={ranks}, {number}/{len(names)}] {record.line()}", flush=True)
                every.append(_row(lever, ranks, record))
        pool.close()
    counts = Counter((row["lever"], row["ranks"], row["verdict"]) for row in every)
    for (lever, ranks, verdict), count in sorted(counts.items()):
        print(f"{lever}, {ranks} ranks: {count} {verdict}")
    if options.output:
        Path(options.output).write_text(json.dumps(_file(options, every), indent=1) + "\n")
    return int(any(row["verdict"] == WRONG for row in every))


def examine(pool: RankPool, name: str, setup: Setup) -> Record:
    try:
        found = pool.run(measure, name, True, setup)
    except CommunicationError as error:
        text = f"{type(error).__name__}: {error}"
        found = [Outcome(seconds=LIMIT_S, error=text[-3000:])] * pool.num_ranks
    record = Record.of(setup.variant(name), {pool.num_ranks: found})
    if record.verdict == WRONG and all(x.error and not x.refused for x in found):
        whole = pool.run(compiled_whole, name, setup)[0]
        if whole:
            return replace(record, verdict=NEITHER, why=whole)
    if record.verdict == WRONG and setup.dtype and not pool.run(has_numbers, name, setup)[0]:
        return examine(pool, name, replace(setup, dtype=None))
    return record


def _row(lever: str, ranks: int, record: Record) -> dict[str, Any]:
    return {
        "lever": lever, "ranks": ranks, "variant": record.name, "verdict": record.verdict,
        "error": record.errors.get(str(ranks)), "up_to_rounding": record.rounding,
        "why": record.why[:400],
    }  # fmt: skip


def _file(options: argparse.Namespace, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(), "source": source(), "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(), "compiler": options.compiler,
        "steps": options.steps, "rows": rows,
    }  # fmt: skip


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.corpus.levers", description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--levers", nargs="+", choices=LEVERS, default=["all"])
    parser.add_argument("--compiler", default="aot_eager")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="'llama/*'")
    parts = "every Nth variant from the Ith"
    parser.add_argument("--part", type=int, nargs=2, default=(1, 1), metavar=("I", "N"), help=parts)
    parser.add_argument("--output", default="", metavar="FILE")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
