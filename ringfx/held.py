"""Masks that modules keep: does a buffer still hold what the program was made for?

A mask buffer becomes a function of positions when the program is made. A write into the buffer
since then, of any kind, would leave the program computing with the old mask: every call compares.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ringfx.errors import BufferChanged
from ringfx.passes.values import Captured

__all__ = ["Held", "fingerprint"]

WORDS = 1 << 20
"""Words of 8 bytes that are read in one go."""


class Held:
    """The buffers whose values one program counts on."""

    def __init__(self, captured: Captured, held: Sequence[int]) -> None:
        self._names = {i: captured.input_names[i] for i in held}
        self._prints = {i: fingerprint(captured.buffers[i]) for i in held}

    def check(self, inputs: Sequence[Any]) -> None:
        """Compare every entry.

        Raises
        ------
        BufferChanged
            Naming the buffer.
        """
        found: dict[tuple[int, torch.Size], int] = {}
        for i, expected in self._prints.items():
            place = (inputs[i].data_ptr(), inputs[i].shape)
            if place not in found:
                found[place] = fingerprint(inputs[i])
            if found[place] != expected:
                raise BufferChanged(
                    f"{self._names[i]} holds other values than when the model was compiled, and "
                    "its attention masks were compiled as functions of positions. Do: call "
                    "torch._dynamo.reset() after changing it, or, if it changes in every call, "
                    "pass it to forward as an argument."
                )


@torch.no_grad()
def fingerprint(value: torch.Tensor) -> int:
    """A hash of a tensor's bytes and their places, 64 bits."""
    raw = value.detach().contiguous().reshape(-1).view(torch.uint8)
    whole = raw.numel() // 8 * 8
    raw = raw.clone() if raw.storage_offset() % 8 else raw
    words = raw[:whole].view(torch.int64)
    rest = torch.nn.functional.pad(raw[whole:], (0, whole + 8 - raw.numel())).view(torch.int64)
    total = _mixed(rest, -1)
    for start in range(0, words.numel(), WORDS):
        total = total + _mixed(words[start : start + WORDS], start)
    return int(total.item())


def _mixed(words: torch.Tensor, start: int) -> torch.Tensor:
    """The sum of SplitMix64's finaliser over each word and its place."""
    place = torch.arange(start, start + words.numel(), device=words.device)
    mixed = words + place * -0x61C8864680B583EB
    mixed = (mixed ^ (mixed >> 30)) * -0x40A7B892E31B1A47
    mixed = (mixed ^ (mixed >> 27)) * -0x6B2FB644ECCEEE15
    return (mixed ^ (mixed >> 31)).sum()
