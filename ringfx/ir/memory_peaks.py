"""The peak of a timeline for many choices, at one length and number of ranks.

The same sums as ``memory_timeline.peak``, whose causes one asks of a choice that is made; here all
that does not depend on the choice is summed once, for a search that tries thousands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ringfx.ir.memory_plan import MemoryMoment, MemoryTimeline
from ringfx.ir.memory_timeline import Held, fixed_parts

__all__ = ["Peaks"]

Numbers = NDArray[np.int64]
MODES = ("", "kept", "again")


class Peaks:
    """Peaks of one rank's memory, in bytes."""

    def __init__(self, timeline: MemoryTimeline, *, world_size: int, seq_len: int) -> None:
        self._timeline = timeline
        fixed = fixed_parts(timeline, world_size=world_size, seq_len=seq_len)
        self._fixed = _numbers(fixed.moments)
        self._kept, self._kept_again, self._moved = map(
            _numbers, (fixed.kept, fixed.kept_again, fixed.moved)
        )
        self._masks = fixed.masks
        moments = timeline.moments
        self._segments = self._column(lambda m: m.segments)
        self._layers = self._column(lambda m: m.layers)
        self._num_masks = self._column(lambda m: m.masks)
        self._mode = self._column(lambda m: MODES.index(m.mode))
        self._working = _pairs([m.working for m in moments])
        self._again = _pairs([m.again for m in moments])
        self._layer_of = _numbers([segment.layer for segment in timeline.segments])
        own = [timeline.segments[m.segments].layer if m.mode else -1 for m in moments]
        self._own = _numbers([x if x < m.layers else -1 for x, m in zip(own, moments, strict=True)])

    def _column(self, of: Callable[[MemoryMoment], int]) -> Numbers:
        return _numbers([of(moment) for moment in self._timeline.moments])

    def of(self, layers: Sequence[Held | None]) -> int:
        """The peak under these layers, which are as ``memory_timeline.peak`` takes them."""
        held = _Columns(layers)
        again = held.is_again[self._layer_of]
        kept = np.where(again, self._kept_again, self._kept)
        moved = np.where(again & held.is_offloaded[self._layer_of], self._moved, 0)
        before = np.concatenate([[0], kept.cumsum() - (moved.cumsum() - moved)])
        in_segment = np.zeros(len(layers), bool)
        in_segment[self._layer_of[again]] = True
        keeps_result = in_segment | np.array([x.keeps_result for x in self._timeline.layers], bool)
        whole = held.saved - held.result  # what is there again in backward
        of_layers = np.where(keeps_result, held.result - held.host, held.saved)
        of_layers[in_segment & held.is_attention_again] = 0
        result_kept = np.where(in_segment & held.is_attention_again, 0, held.result)

        total = self._fixed + before[self._segments]
        total += np.concatenate([[0], of_layers.cumsum()])[self._layers]
        total += np.concatenate([held.host, [0]])[self._own]
        np.add.at(total, self._again[0], (whole + held.result - result_kept)[self._again[1]])
        work = np.zeros(len(total), np.int64)
        np.maximum.at(work, self._working[0], held.workspace[self._working[1]])
        total += work
        rows, masks = self._masks(layers)
        total += rows + _numbers(masks)[self._num_masks]
        mode = np.where(again, MODES.index("again"), MODES.index("kept"))
        there = self._mode == 0
        there[~there] = self._mode[~there] == mode[self._segments[~there]]
        return int(total[there].max())


class _Columns:
    """What layers hold, by number; nothing of one that is None."""

    def __init__(self, layers: Sequence[Held | None]) -> None:
        def column(of: Callable[[Held], int], nothing: int) -> Numbers:
            return _numbers([nothing if x is None else of(x) for x in layers])

        self.saved = column(lambda x: x.saved_bytes, 0)
        self.result = column(lambda x: x.result_bytes, 0)
        self.host = column(lambda x: x.host_result_bytes, 0)
        self.workspace = column(lambda x: x.workspace_bytes, 0)
        self.is_again = column(lambda x: x.recomputed, 1).astype(bool)
        self.is_attention_again = column(lambda x: x.attention_again, 1).astype(bool)
        self.is_offloaded = column(lambda x: x.offloaded, 1).astype(bool)


def _numbers(values: Sequence[int]) -> Numbers:
    return np.array(values, np.int64)


def _pairs(of_moments: Sequence[Sequence[int]]) -> tuple[Numbers, Numbers]:
    """Numbers of moments, and of a layer of each."""
    pairs = [(i, layer) for i, layers in enumerate(of_moments) for layer in layers]
    return _numbers([i for i, _ in pairs]), _numbers([layer for _, layer in pairs])
