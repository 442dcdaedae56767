"""A tensor of addresses alone: no page is behind it until it is read, and that can be asked.

In the place of a sharded parameter, a read by code that should not read it is found out. A tensor
whose storage has no bytes would end the process in most operators of the CPU, without a word.
"""

from __future__ import annotations

import ctypes
import functools
import mmap

import torch

__all__ = ["UntouchedMemory"]

_NO_RESERVE = 0x4000
"""Linux: the pages are not counted before they are used, so that any size can be asked for."""


class UntouchedMemory:
    """The memory of one tensor on the CPU."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype) -> None:
        elements = max(1, shape.numel())
        self._size = elements * dtype.itemsize
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
        self._map = mmap.mmap(-1, self._size, flags=flags)
        self._flat = torch.frombuffer(self._map, dtype=dtype, count=elements)
        self.tensor = self._flat[: shape.numel()].view(shape)

    @staticmethod
    @functools.cache
    def is_told() -> bool:
        """Whether this system says which pages were touched; some sandboxes do not."""
        try:
            found = UntouchedMemory(torch.Size([2 * mmap.PAGESIZE]), torch.uint8)
            before = found.was_touched()
            found.tensor[-1].item()
            return not before and found.was_touched()
        except (OSError, AttributeError, ValueError):
            return False

    def was_touched(self) -> bool:
        """Whether anything was read or written since it was made, or forgotten."""
        pages = (ctypes.c_ubyte * -(-self._size // mmap.PAGESIZE))()
        address = ctypes.c_void_p(self._flat.data_ptr())
        if ctypes.CDLL(None, use_errno=True).mincore(address, ctypes.c_size_t(self._size), pages):
            raise OSError(ctypes.get_errno(), "mincore")
        return any(bytes(pages))

    def forget(self) -> None:
        """Give the pages back: what was written is gone."""
        self._map.madvise(mmap.MADV_DONTNEED)
