"""What all stages share: what they are asked for, and the file that they write."""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

__all__ = ["Report", "Setting", "attempted", "median_ms", "relative_error"]

PACKAGES = ("torch", "triton", "transformers", "flash-attn", "xformers", "nvidia-cudnn-cu13")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """On which device, and whether only to show that everything runs."""

    device: str
    small: bool
    folder: Path

    @property
    def is_cuda(self) -> bool:
        return self.device == "cuda"


def attempted(attempt: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """What it found, or what it raised."""
    try:
        return {"ok": True, **attempt()}
    except Exception as error:  # a stage goes on after whatever fails, and says so
        return {"ok": False, "error": f"{type(error).__name__}: {error}"[:2000]}


@dataclass(kw_only=True)
class Report:
    """A stage's file: where it ran, and one row for each thing that was tried."""

    stage: str
    setting: Setting
    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def path(self) -> Path:
        return self.setting.folder / f"{self.stage}.json"

    def tried(self, name: str, attempt: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """Runs one attempt; what it raises is its row, and the next is tried."""
        began = time.monotonic()
        found = attempted(attempt)
        self.add({"name": name, **found, "seconds": round(time.monotonic() - began, 2)})
        return self.rows[-1]

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.failures += not row.get("ok", True)
        self.write()
        print(f"[{self.stage}] {_line(row)}", flush=True)

    def write(self) -> None:
        text = json.dumps({**self.origin(), "rows": self.rows}, indent=1, default=str)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(text + "\n")

    def origin(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "date": datetime.date.today().isoformat(),
            "commit": _output("git", "rev-parse", "--short=9", "HEAD"),
            "small": self.setting.small,
            "device": device_words(self.setting.device),
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cuda": torch.version.cuda or "",
            "python": platform.python_version(),
            "packages": {name: version for name in PACKAGES if (version := _version(name))},
            "seconds": round(time.monotonic() - self.started, 1),
            "failures": self.failures,
        }


def device_words(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "cpu"


def _line(row: Mapping[str, Any]) -> str:
    values = (f"{k} {_short(v)}" for k, v in row.items() if k not in ("name", "ok"))
    return f"{row['name']}: {'' if row.get('ok', True) else 'FAILED '}{', '.join(values)}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:300]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference over the norm of the exact."""
    size = float(exact.double().norm())
    return float((found.double() - exact.double()).norm()) / max(size, 1e-30)


def median_ms(work: Callable[[], object], device: str, repeats: int) -> tuple[float, float]:
    """Median milliseconds after two warm-ups, and half the interquartile range over it."""
    times = []
    for _ in range(repeats + 2):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            start = time.perf_counter()
            work()
            times.append(1e3 * (time.perf_counter() - start))
    kept = sorted(times[2:])
    middle = statistics.median(kept)
    low, high = kept[len(kept) // 4], kept[(3 * len(kept)) // 4]
    return middle, (high - low) / 2 / middle
