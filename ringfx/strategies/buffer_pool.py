"""Buffers for messages, kept for the next layer and the next step.

A fresh buffer of some megabytes costs a page fault every 4 KiB on a CPU. Buffers are bytes, looked
at as whatever type the message has, so that K/V and their gradients share them.
"""

from __future__ import annotations

import threading

import torch

__all__ = ["POOL", "BufferPool"]


class BufferPool:
    """Free buffers by device and size; at most ``limit`` of each are kept."""

    def __init__(self, limit: int = 8) -> None:
        self._limit = limit
        self._free: dict[tuple[torch.device, int], list[torch.Tensor]] = {}
        self._lock = threading.Lock()

    def take(self, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A contiguous [numel] with anything in it."""
        size = numel * dtype.itemsize
        with self._lock:
            free = self._free.get((device, size))
            buffer = free.pop() if free else None
        if buffer is None:
            buffer = torch.empty(size, dtype=torch.uint8, device=device)
        return buffer.view(dtype)

    def give(self, buffer: torch.Tensor) -> None:
        """Back for others; nobody may hold a view of it, no message may be under way in it."""
        held = buffer.view(torch.uint8)
        with self._lock:
            free = self._free.setdefault((held.device, held.numel()), [])
            if len(free) < self._limit:
                free.append(held)

    def clear(self) -> None:
        """Gives all memory back to the allocator."""
        with self._lock:
            self._free.clear()

    @property
    def free_bytes(self) -> int:
        with self._lock:
            return sum(size * len(free) for (_, size), free in self._free.items())


POOL = BufferPool()
"""One for the process: every layer and step draws from it."""
