"""The main job of ringfx, checked: one Llama trained whole, at one rank, and split over two ranks.

Three runs of examples/train.py on the same bytes from the same weights, each in processes of its
own: the stock model under torch.compile, ringfx at one rank (which recovers the causal mask but
splits nothing), ringfx on two gloo ranks. They must agree, at the first step in the loss to 1e-6
and in every parameter's gradient to 1e-4, later in the loss to 1e-3; otherwise the exit code is 1.
Every number that is printed was measured in this run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from examples.agreement import disagreements, largest_gradient_difference, loss_difference
from examples.runs import Run, RunError, Setting, execute


def main() -> int:
    options = _options()
    console = Console(width=None if sys.stdout.isatty() else 100)
    begin = time.monotonic()
    console.print(
        f"Training a byte-level Llama at {options.seq_len} tokens for {options.steps} steps, "
        f"three times, under {options.compiler}."
    )
    try:
        runs = _train(options, console)
    except RunError as failure:
        console.print(str(failure), markup=False, highlight=False)
        return 1
    stock, *others = runs
    console.print(others[-1].plan, markup=False, highlight=False, soft_wrap=True)
    console.print(_loss_table(runs))
    console.print(_summary_table(runs))
    for run in others:
        difference, where = largest_gradient_difference(stock, run)
        console.print(
            f"{run.setting.name}: the gradient that differs most, by {difference:.1e}: {where}",
            highlight=False,
        )
    wrong = [text for run in others for text in disagreements(stock, run)]
    for text in wrong:
        console.print(f"DISAGREES: {text}", style="bold red", highlight=False)
    if not wrong:
        console.print("All runs agree: same losses, same gradients on every rank.", style="green")
    console.print(f"{time.monotonic() - begin:.0f} s in all.")
    return 1 if wrong else 0


def _train(options: argparse.Namespace, console: Console) -> list[Run]:
    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn())
    with (
        tempfile.TemporaryDirectory(prefix="ringfx-demo-") as folder,
        Progress(*columns, TimeElapsedColumn(), console=console) as progress,
    ):
        return [
            _train_one(setting, Path(folder), options.steps, progress)
            for setting in _settings(options)
        ]


def _settings(options: argparse.Namespace) -> list[Setting]:
    """Two threads for each run in all, so that two ranks have no more cores than one."""
    common = ["--steps", options.steps, "--seq-len", options.seq_len]
    common += ["--compiler", options.compiler]
    shared = tuple(map(str, common))
    ringfx = (*shared, "--ringfx", "--strategy", options.strategy)
    return [
        Setting(name="unsplit", ranks=1, threads=2, arguments=shared),
        Setting(name="ringfx, 1 rank", ranks=1, threads=2, arguments=ringfx),
        Setting(name="ringfx, 2 ranks", ranks=2, threads=1, arguments=ringfx),
    ]


def _train_one(setting: Setting, folder: Path, steps: int, progress: Progress) -> Run:
    task = progress.add_task(f"{setting.name}: importing", total=steps)

    def show(event: dict[str, Any]) -> None:
        if event["event"] == "started":
            progress.update(task, description=f"{setting.name}: compiling")
        if event["event"] == "step":
            text = f"{setting.name}: loss {event['loss']:.4f}"
            progress.update(task, advance=1, description=text)

    return execute(setting, folder, show)


def _loss_table(runs: Sequence[Run]) -> Table:
    stock, *others = runs
    table = Table(
        title="Loss of each step, and the largest relative difference of any rank from unsplit"
    )
    table.add_column("step", justify="right")
    for run in runs:
        table.add_column(run.setting.name, justify="right")
        if run is not stock:
            table.add_column("difference", justify="right")
    for step, loss in enumerate(stock.losses[0]):
        row = [str(step), f"{loss:.6f}"]
        for run in others:
            row += [f"{run.losses[0][step]:.6f}", f"{loss_difference(stock, run, step):.1e}"]
        table.add_row(*row)
    return table


def _summary_table(runs: Sequence[Run]) -> Table:
    stock = runs[0]
    table = Table(title="What a step costs, and how far its gradients are from unsplit")
    table.caption_justify = "left"
    for name in ("run", "ranks x threads", "s / step", "MiB / rank", "worst gradient"):
        table.add_column(name, justify="left" if name == "run" else "right")
    for run in runs:
        extra = run.worst_extra_bytes
        difference, _ = largest_gradient_difference(stock, run)
        table.add_row(
            run.setting.name,
            f"{run.setting.ranks} x {run.setting.threads}",
            # The first step compiles.
            f"{statistics.median(run.seconds[1:] or run.seconds):.2f}",
            "not measured" if extra is None else f"{extra / 2**20:.0f}",
            "" if run is stock else f"{difference:.1e}",
        )
    table.caption = (
        "s / step: median without the first, which compiles.\n"
        "MiB / rank: peak resident memory of one step beyond what stays\n"
        "(parameters, gradients, optimizer state), worst rank.\n"
        "worst gradient: relative difference of any parameter on any rank."
    )
    return table


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--compiler", default="inductor")
    parser.add_argument("--strategy", default="auto")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
