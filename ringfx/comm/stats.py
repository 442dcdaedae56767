"""What each attention did: counters always, timings and profiler ranges only when asked for.

A counter is one addition on the host. Timings need the device to be waited for at each step, so
they are taken only inside ``timed()``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch.autograd.profiler import record_function

from ringfx.torch_compat.autograd import profiler_is_on

__all__ = ["LayerStats", "layer", "reset", "snapshot", "span", "timed"]


@dataclass(kw_only=True)
class LayerStats:
    """Sums over all calls of one layer on this rank since ``reset``."""

    kernel: str = ""
    """The local kernel that ran last."""
    ran: Mapping[str, str] = field(default_factory=dict)
    """For each kernel that a plan named what ran: attentions of one name may differ in it."""
    forwards: int = 0
    backwards: int = 0
    tiles: int = 0
    """Kernel calls."""
    flops: int = 0
    """Operations of the products of q, k and v that the mask's tiles ask for; where a causal
    diagonal lies, of its lower half."""
    messages: int = 0
    bytes_sent: int = 0
    retries: int = 0
    """Tiles that ran out of memory and were halved."""
    compute_s: float = 0.0
    """In kernels and merges; 0 outside ``timed()``."""
    wait_s: float = 0.0
    """Waiting for messages, after what could be hidden was; 0 outside ``timed()``."""


class _Registry:
    def __init__(self) -> None:
        self.layers: dict[str, LayerStats] = {}
        self.lock = threading.Lock()
        self.timing = False


_REGISTRY = _Registry()


def layer(name: str) -> LayerStats:
    """The running sums of a layer."""
    with _REGISTRY.lock:
        return _REGISTRY.layers.setdefault(name, LayerStats())


def snapshot() -> dict[str, LayerStats]:
    """A copy of all layers' sums, by layer name.

    >>> reset()
    >>> layer("layers.0").tiles += 3
    >>> snapshot()["layers.0"].tiles
    3
    """
    with _REGISTRY.lock:
        return {name: dataclasses.replace(found) for name, found in _REGISTRY.layers.items()}


def reset() -> None:
    """Forgets all sums."""
    with _REGISTRY.lock:
        _REGISTRY.layers.clear()


@contextlib.contextmanager
def timed() -> Iterator[None]:
    """Inside, compute and waiting are timed; on a GPU this gives up overlap with the host."""
    before, _REGISTRY.timing = _REGISTRY.timing, True
    try:
        yield
    finally:
        _REGISTRY.timing = before


@contextlib.contextmanager
def _measured(stats: LayerStats, label: str, field: str) -> Iterator[None]:
    with record_function(label):
        start = time.perf_counter()
        try:
            yield
        finally:
            if _REGISTRY.timing:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                setattr(stats, field, getattr(stats, field) + time.perf_counter() - start)


def span(stats: LayerStats, label: str, field: str) -> contextlib.AbstractContextManager[None]:
    """A range in torch.profiler, timed into ``field``; nothing when neither is on."""
    if _REGISTRY.timing or profiler_is_on():
        return _measured(stats, label, field)
    return contextlib.nullcontext()
