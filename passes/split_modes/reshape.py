"""Row-major reshapes that leave the tokens side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from ringfx.passes.axes import how
from ringfx.passes.split_modes.local_call import LocalCall, local_shape
from ringfx.passes.split_modes.mode import CallOnLine, CannotSplit, SplitMode
from ringfx.passes.split_modes.placement import Placement

__all__ = ["Reshape"]

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Reshape(SplitMode):
    """A reshape to the local sizes; of further operands only shapes are read."""

    is_token_local: ClassVar[bool] = True

    @staticmethod
    def match(call: CallOnLine) -> Reshape | CannotSplit | None:
        if not isinstance(call.axes.how, how.Reshape):
            return None
        if all(call.on_line(tokens) for tokens in (*call.operands[:1], *call.results)):
            return Reshape(operands=(Placement.SHARDED, *call.rest(Placement.RANK_LOCAL)))
        return CannotSplit("its reshape regroups the token axis")

    def emit(self, call: LocalCall) -> Node:
        shape = local_shape(call.local.lines, call.node)
        return call.emit(aten.reshape.default, call.operands[0], list(shape))
