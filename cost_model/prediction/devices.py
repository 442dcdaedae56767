"""The name by which a device calls itself, so that a profile can be found for it."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import torch

__all__ = ["device_capability", "device_name"]


def device_name(device: str) -> str | None:
    """Name of this machine's device of that type; None where it has none.

    ``cpu`` gives the processor's model name, ``cuda`` the first visible GPU's.
    """
    if device == "cpu":
        return _cpu_name()
    if device == "cuda":
        return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return None


def device_capability(device: str) -> str:
    """Compute capability of the first visible GPU, such as 9.0; empty where there is none."""
    if device != "cuda" or not torch.cuda.is_available():
        return ""
    return "{}.{}".format(*torch.cuda.get_device_capability(0))


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else (platform.processor() or platform.machine())
