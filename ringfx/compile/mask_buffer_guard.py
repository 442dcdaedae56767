"""Mask buffers of modules: does a buffer still have the values it had at compilation?

A mask buffer becomes a function of positions when the program is made. A write into the buffer
since then would leave the program computing with the old mask, and neither its version nor its
address shows every write (through ``.data``, or numpy). So every call compares the whole buffer
with a copy, which is faster than a hash. An unchanged buffer needs no checksum for the other ranks
either (``rank_agreement.py``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from ringfx.compile.rank_agreement import raw_bytes
from ringfx.errors import BufferChanged
from ringfx.ir.values import Captured

__all__ = ["BufferSnapshot", "buffers_to_watch", "refuse_changed_buffers"]

Tensor = torch.Tensor


class BufferSnapshot:
    """The values of modules' buffers at compilation; equal buffers share one copy."""

    def __init__(self, buffers: Mapping[int, Tensor]) -> None:
        self._copies: dict[int, Tensor] = {}
        different: list[Tensor] = []
        for i, buffer in buffers.items():
            bits = _bits(buffer)
            same = next((copy for copy in different if torch.equal(copy, bits)), None)
            if same is None:
                same = bits.clone()
                different.append(same)
            self._copies[i] = same

    def unchanged(self, inputs: Sequence[Any]) -> frozenset[int]:
        """The numbers of the unchanged buffers; each place in memory is compared once."""
        found: dict[tuple[int, torch.Size, int], bool] = {}
        same = set()
        for i, copy in self._copies.items():
            place = (inputs[i].data_ptr(), inputs[i].shape, id(copy))
            if place not in found:
                found[place] = torch.equal(copy, _bits(inputs[i]))
            if found[place]:
                same.add(i)
        return frozenset(same)


def buffers_to_watch(captured: Captured, held: Collection[int]) -> Mapping[int, Tensor]:
    """Buffers to copy: those that masks depend on, and all that have a checksum in every call,
    which floating-point buffers have not."""
    return {
        i: value
        for i, value in captured.buffers.items()
        if i in held or not (value.is_floating_point() or value.is_complex())
    }


def refuse_changed_buffers(
    names: Sequence[str], held: Collection[int], unchanged: Collection[int]
) -> None:
    """Raises ``BufferChanged``, naming the first of ``held`` that is not unchanged."""
    for i in held:
        if i not in unchanged:
            raise BufferChanged(
                f"{names[i]} has other values than when the model was compiled, but its attention "
                "masks were compiled as functions of positions from the old values. Do: call "
                "torch._dynamo.reset() after changing it; or, if it changes in every call, pass "
                "it to forward as an argument."
            )


def _bits(value: Tensor) -> Tensor:
    """A tensor's bytes, in words of 8 where they fill words: NaN equals itself so."""
    raw = raw_bytes(value)
    words = raw.numel() % 8 == 0 and raw.storage_offset() % 8 == 0
    return raw.view(torch.int64) if words else raw
