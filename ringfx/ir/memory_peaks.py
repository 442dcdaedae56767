"""The peaks of a timeline under many choices at once, at one length and number of ranks.

The same sums as ``memory_timeline.peak``, whose causes one asks of a choice that is made; here all
that does not depend on the choice is summed once, for a search that tries thousands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ringfx.ir.memory_plan import MemoryMoment, MemoryTimeline
from ringfx.ir.memory_timeline import Held, fixed_parts, segment_bytes

__all__ = ["NOWHERE", "Numbers", "Peaks"]

Numbers: TypeAlias = NDArray[np.int64]
Flags: TypeAlias = NDArray[np.bool_]
MODES = ("", "kept", "again")

NOWHERE = -1
"""In place of the bytes of a moment that a choice does not have."""


class Peaks:
    """Peaks of one rank's memory, in bytes.

    A choice is a row with the number of an option for each layer of the timeline.

    Parameters
    ----------
    menus
        What each layer of the timeline may hold, in its order, as ``memory_timeline.peak`` takes
        it.
    """

    def __init__(
        self,
        timeline: MemoryTimeline,
        menus: Sequence[Sequence[Held | None]],
        *,
        world_size: int,
        seq_len: int,
    ) -> None:
        moments, num = timeline.moments, len(timeline.layers)
        fixed = fixed_parts(timeline, world_size=world_size, seq_len=seq_len)
        self._fixed = _numbers(fixed.moments)
        self._rows, self._masks = _numbers(fixed.rows), _numbers(fixed.masks)
        self._readers = [list(mask.readers) for mask in timeline.masks]
        self._is_split = world_size > 1
        segments = segment_bytes(timeline, world_size=world_size, seq_len=seq_len)
        self._kept = _numbers([x.kept for x in segments])
        self._kept_again = _numbers([x.again for x in segments])
        self._moved = _numbers([x.moved for x in segments])
        self._options = _Held.of(menus)
        self._segments = _column(moments, lambda m: m.segments)
        self._layers = _column(moments, lambda m: m.layers)
        self._num_masks = _column(moments, lambda m: m.masks)
        self._mode = _column(moments, lambda m: MODES.index(m.mode))
        self._working = _listed([m.working for m in moments], num)
        self._again = _listed([m.again for m in moments], num)
        self._layer_of = _numbers([segment.layer for segment in timeline.segments])
        self._keeps_result = np.array([x.keeps_result for x in timeline.layers], bool)
        own = [timeline.segments[m.segments].layer if m.mode else num for m in moments]
        self._own = _numbers(
            [x if x < m.layers else num for x, m in zip(own, moments, strict=True)]
        )

    def of(self, picked: Numbers) -> Numbers:
        """The peak under each choice."""
        found: Numbers = self.at_moments(picked).max(1)
        return found

    def at_moments(self, picked: Numbers) -> Numbers:
        """The sum at each moment, in a row for each choice; ``NOWHERE`` where it has no such."""
        held = self._options.taken(picked)
        again = held.is_again[:, self._layer_of]
        kept = np.where(again, self._kept_again, self._kept)
        moved = np.where(again & held.is_offloaded[:, self._layer_of], self._moved, 0)
        before = _sums(kept)
        before[:, 1:] -= _sums(moved)[:, :-1]  # what the last of them offloaded is back
        in_segment = np.zeros(picked.shape, bool)
        in_segment[:, self._layer_of] = again
        is_run_again = in_segment & held.is_attention_again
        of_layers = np.where(in_segment | self._keeps_result, held.result - held.host, held.saved)
        of_layers[is_run_again] = 0
        result_kept = np.where(is_run_again, 0, held.result)

        total: Numbers = self._fixed + before[:, self._segments]
        total += _sums(of_layers)[:, self._layers]
        total += _and_nothing(held.host)[:, self._own]
        total += _and_nothing(held.saved - result_kept)[:, self._again].sum(2)
        total += _and_nothing(held.workspace)[:, self._working].max(2)
        total += self._of_masks(held.own_queries)
        modes = _and_nothing(np.where(again, MODES.index("again"), MODES.index("kept")))
        total[(self._mode > 0) & (self._mode != modes[:, self._segments])] = NOWHERE
        return total

    def _of_masks(self, own_queries: Flags) -> Numbers:
        taken = np.zeros((len(own_queries), len(self._readers)), bool)
        for i, readers in enumerate(self._readers if self._is_split else ()):
            taken[:, i] = own_queries[:, readers].any(1)
        rows: Numbers = np.where(taken, self._rows, 0).sum(1, keepdims=True)
        return rows + _sums(np.where(taken, 0, self._masks))[:, self._num_masks]


@dataclass(frozen=True, eq=False, kw_only=True)
class _Held:
    """What layers hold: of each its options, or of each choice its layers."""

    saved: Numbers
    result: Numbers
    host: Numbers
    workspace: Numbers
    is_again: Flags
    is_attention_again: Flags
    is_offloaded: Flags
    own_queries: Flags

    @staticmethod
    def of(menus: Sequence[Sequence[Held | None]]) -> _Held:
        """Layer by option; nothing of one that is None, and it is computed again."""
        most = max(map(len, menus), default=0)

        def table(of: Callable[[Held], int], nothing: int) -> Numbers:
            rows = [[nothing if x is None else of(x) for x in menu] for menu in menus]
            padded = _numbers([[*row, *[0] * (most - len(row))] for row in rows])
            return padded.reshape(len(menus), most)

        return _Held(
            saved=table(lambda x: x.saved_bytes, 0),
            result=table(lambda x: x.result_bytes, 0),
            host=table(lambda x: x.host_result_bytes, 0),
            workspace=table(lambda x: x.workspace_bytes, 0),
            is_again=table(lambda x: x.recomputed, 1).astype(bool),
            is_attention_again=table(lambda x: x.attention_again, 1).astype(bool),
            is_offloaded=table(lambda x: x.offloaded, 1).astype(bool),
            own_queries=table(lambda x: x.own_queries, 1).astype(bool),
        )

    def taken(self, picked: Numbers) -> _Held:
        """Choice by layer."""
        layers = np.arange(picked.shape[1])
        return _Held(**{x.name: getattr(self, x.name)[layers, picked] for x in fields(self)})


def _numbers(values: Sequence[int] | Sequence[Sequence[int]]) -> Numbers:
    return np.array(values, np.int64)


def _column(moments: Sequence[MemoryMoment], of: Callable[[MemoryMoment], int]) -> Numbers:
    return _numbers([of(moment) for moment in moments])


def _listed(of_moments: Sequence[Sequence[int]], nothing: int) -> Numbers:
    """Layers of each moment in a row, as long as the longest: ``nothing`` is none."""
    most = max(map(len, of_moments), default=0) or 1
    return _numbers([[*layers, *[nothing] * (most - len(layers))] for layers in of_moments])


def _sums(values: Numbers) -> Numbers:
    """Of each row the sums of the first: of none, of one, of two."""
    return np.concatenate([np.zeros((len(values), 1), np.int64), values.cumsum(1)], axis=1)


def _and_nothing(values: Numbers) -> Numbers:
    return np.concatenate([values, np.zeros((len(values), 1), np.int64)], axis=1)
