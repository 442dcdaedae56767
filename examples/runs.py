"""Starts examples.train in fresh processes and reads what its ranks reported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["Run", "RunError", "Setting", "execute"]

ROOT = Path(__file__).parent.parent
LOOPBACK = "127.0.0.1"


class RunError(RuntimeError):
    """A training process ended with an error; the text holds the end of its output."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to run the training script."""

    name: str
    ranks: int
    threads: int
    """Threads of each rank."""
    arguments: tuple[str, ...] = ()

    def command(self, report: Path) -> list[str]:
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(self.ranks)]
        launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{LOOPBACK}:0"]
        launcher += ["--local-addr", LOOPBACK, "-m", "examples.train"]
        start = launcher if self.ranks > 1 else ["-m", "examples.train"]
        own = ["--threads", str(self.threads), "--report", str(report)]
        return [sys.executable, *start, *own, *self.arguments]


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """What the ranks of one run reported."""

    setting: Setting
    losses: tuple[tuple[float, ...], ...]
    """By rank, then by step."""
    seconds: tuple[float, ...]
    """Of each step: the slowest rank's."""
    extra_bytes: tuple[int | None, ...]
    """By rank: peak memory of one step beyond what was there before it."""
    gradients: tuple[dict[str, torch.Tensor | None], ...]
    """By rank: each parameter's gradient after the first step."""
    plan: str

    @property
    def worst_extra_bytes(self) -> int | None:
        measured = [value for value in self.extra_bytes if value is not None]
        return max(measured) if len(measured) == len(self.extra_bytes) else None


def execute(
    setting: Setting, folder: Path, on_event: Callable[[dict[str, Any]], None] = lambda _: None
) -> Run:
    """Runs the setting in fresh processes; ``on_event`` sees rank 0's reports as they come."""
    report = folder / setting.name.replace(" ", "-")
    environment = {**os.environ, "OMP_NUM_THREADS": str(setting.threads)}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    log = folder / f"{report.name}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            setting.command(report), cwd=ROOT, env=environment, stdout=output, stderr=output
        )
        try:
            _follow(process, report / "rank0.jsonl", on_event)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode != 0:
        end = "\n".join(log.read_text().splitlines()[-40:])
        raise RunError(f"{setting.name} ended with exit code {process.returncode}:\n{end}")
    return _read(setting, report)


def _follow(
    process: subprocess.Popen[bytes], path: Path, on_event: Callable[[dict[str, Any]], None]
) -> None:
    """Passes on each complete line of a growing file until the process ends."""
    seen = 0
    running = True
    while running:
        running = process.poll() is None
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        for line in lines[seen:]:
            on_event(json.loads(line))
        seen = len(lines)
        if running:
            time.sleep(0.1)


def _read(setting: Setting, report: Path) -> Run:
    by_rank = [_events(report / f"rank{rank}.jsonl") for rank in range(setting.ranks)]
    steps = [_values(events, "step", "seconds") for events in by_rank]
    return Run(
        setting=setting,
        losses=tuple(tuple(_values(events, "step", "loss")) for events in by_rank),
        seconds=tuple(max(times) for times in zip(*steps, strict=True)),
        extra_bytes=tuple(_values(events, "memory", "bytes")[0] for events in by_rank),
        gradients=tuple(
            torch.load(report / f"gradients{rank}.pt") for rank in range(setting.ranks)
        ),
        plan=_values(by_rank[0], "plan", "text")[0],
    )


def _events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _values(events: Sequence[dict[str, Any]], event: str, key: str) -> list[Any]:
    return [e[key] for e in events if e["event"] == event]
