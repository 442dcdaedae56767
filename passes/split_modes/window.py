"""Slices of the tokens that are stored as the tokens that they are cut out of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node

from ringfx.passes.axes import how
from ringfx.passes.split_modes.concat import shift_tokens
from ringfx.passes.split_modes.labelled import split_by_labels
from ringfx.passes.split_modes.local_call import LocalCall
from ringfx.passes.split_modes.lookup import TakeRange
from ringfx.passes.split_modes.mode import CallOnLine, CannotSplit, SplitMode
from ringfx.passes.split_modes.placement import Placement

__all__ = ["Window"]


@dataclass(frozen=True, kw_only=True)
class Window(SplitMode):
    """A slice is stored as its source, or a few positions further; nothing is computed."""

    by: int = 0
    """How many positions it moves: its element at p + by is wanted at p."""

    is_window: ClassVar[bool] = True

    @staticmethod
    def match(call: CallOnLine) -> SplitMode | CannotSplit | None:
        axes, source = call.axes, call.source
        if not axes.windows or isinstance(axes.how, how.Concat):
            return None
        window = axes.windows[0]
        if len(call.results) != 1 or not call.on_line(source):
            return split_by_labels(call)
        if f"d{source.dim}" != window.source:
            return split_by_labels(call)
        (result,) = call.results
        copies = source.outer * source.inner
        if call.on_line(result):
            if result.outer * result.inner != copies:
                return CannotSplit(axes.reason)  # streams side by side: other tokens
            by = source.member.offset + window.start - result.member.offset
            if abs(by) <= call.chunk_length:
                return Window(operands=(Placement.SHARDED,), by=by)
        if copies == 1 and (result is None or call.on_line(result)):
            return TakeRange.of(call, window.start, window.length)
        return CannotSplit(axes.reason)

    @property
    def is_free(self) -> bool:
        return self.by == 0

    def emit(self, call: LocalCall) -> Node:
        return shift_tokens(call, call.operands[0], call.call.operands[0], self.by)
