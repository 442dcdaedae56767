"""``python -m benchmarks.gpu``: the stages one after the other, and a table of how they went."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.gpu.stage import Setting

RESULTS = Path(__file__).parent.parent / "results" / "gpu"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One part of the kit: a function of a module, and how long it may take."""

    name: str
    module: str
    function: str
    what: str
    limit_s: int = 480


STAGES = (
    Stage(
        name="kernels",
        module="kernels",
        function="run",
        what="every kernel against float64",
    ),
    Stage(
        name="product",
        module="product",
        function="run",
        what="models split over 2 and 3 ranks on one device",
    ),
    Stage(
        name="large",
        module="product",
        function="run_large",
        what="a Llama of 1B parameters at one rank",
    ),
    Stage(
        name="speed",
        module="speed",
        function="run",
        what="TFLOP/s of kernels, and of the ring's tiles",
    ),
    Stage(
        name="calibrate",
        module="calibration",
        function="run",
        what="this device's profile and its held-out error",
    ),
    Stage(
        name="seed",
        module="seed",
        function="run",
        what="the seed's experiment at its shapes",
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    folder = options.output
    setting = Setting(device=options.device, small=options.small, folder=folder)
    if options.alone:
        return _alone(options.alone, setting)
    wanted = [stage for stage in STAGES if not options.only or stage.name in options.only]
    ended = {stage.name: _run(stage, options) for stage in wanted}
    _table(wanted, ended, folder)
    return int(any(said != "done" for said in ended.values()))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    names = [stage.name for stage in STAGES]
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="only show that every stage runs")
    parser.add_argument("--only", nargs="+", default=[], choices=names)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--alone", choices=names, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _alone(name: str, setting: Setting) -> int:
    """One stage in this process."""
    (stage,) = [stage for stage in STAGES if stage.name == name]
    if not setting.is_cuda:
        torch.set_num_threads(1)
    report = getattr(import_module(f"benchmarks.gpu.{stage.module}"), stage.function)(setting)
    report.write()
    return int(report.failures > 0)


def _run(stage: Stage, options: argparse.Namespace) -> str:
    """``done``, or how the stage ended otherwise; what it wrote is there in any case."""
    print(f"== {stage.name}: {stage.what} (at most {stage.limit_s} s)", flush=True)
    (options.output / f"{stage.name}.json").unlink(missing_ok=True)
    words = ["--alone", stage.name, "--device", options.device, "--output", str(options.output)]
    command = [sys.executable, "-m", "benchmarks.gpu", *words, *(["--small"] * options.small)]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        code = process.wait(stage.limit_s)
    except subprocess.TimeoutExpired:
        _end(process)
        return f"stopped after {stage.limit_s} s"
    except BaseException:
        _end(process)
        raise
    return "done" if code == 0 else f"ended with {code}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """The stage and the ranks that it started."""
    os.killpg(process.pid, signal.SIGTERM)
    time.sleep(2)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _table(stages: Sequence[Stage], ended: dict[str, str], folder: Path) -> None:
    table = Table("stage", "ended", "tried", "failed", "seconds", "device")
    for stage in stages:
        found = _read(folder / f"{stage.name}.json")
        rows: list[dict[str, Any]] = found.get("rows", [])
        failed = [row["name"] for row in rows if not row.get("ok", True)]
        table.add_row(
            stage.name, ended[stage.name], str(len(rows)), str(len(failed)),
            str(found.get("seconds", "")), str(found.get("device", "")),
        )  # fmt: skip
        for name in failed[:10]:
            table.add_row("", f"  failed: {name}", "", "", "", "")
    Console().print(table)
    print(f"results: {folder}")


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.exists() else {}


if __name__ == "__main__":
    sys.exit(main())
