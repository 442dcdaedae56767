"""How much memory one training step needs beyond what is already there.

peak resident memory of the step minus resident memory before it. Meant for a warmed-up process in
which gradients and optimizer state are allocated, so that what remains is what a step itself needs:
activations, what is saved for backward, communication buffers and scratch.
"""

from __future__ import annotations

import ctypes
import gc
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["extra_bytes"]

PROC = Path("/proc/self")


def extra_bytes(step: Callable[[], object]) -> int | None:
    """Runs ``step`` and returns its extra memory in bytes; None where there is no /proc."""
    if not (PROC / "statm").exists():
        step()
        return None
    _return_free_memory()
    before = _resident_bytes()
    return max(0, _peak_bytes(step) - before)


def _peak_bytes(step: Callable[[], object]) -> int:
    try:
        (PROC / "clear_refs").write_text("5")  # sets the kernel's high-water mark to what is now
    except OSError:
        return _sampled_peak_bytes(step)
    step()
    for line in (PROC / "status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def _sampled_peak_bytes(step: Callable[[], object]) -> int:
    """Where the high-water mark cannot be reset: looks every millisecond, and may miss a spike."""
    peak = _resident_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, _resident_bytes())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    step()
    done.set()
    watcher.join()
    return peak


def _resident_bytes() -> int:
    return int((PROC / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _return_free_memory() -> None:
    """Without this, memory that the allocator keeps from earlier steps would count as "before"."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
