"""Random numbers of a sharded tensor: those that the unsplit program draws."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from ringfx.comm import random_draws
from ringfx.passes.axes import how
from ringfx.passes.split_modes.labelled import Labelled, split_by_labels
from ringfx.passes.split_modes.local_call import LocalCall
from ringfx.passes.split_modes.mode import CallOnLine, CannotSplit, SplitMode

__all__ = ["RandomDraw"]

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class RandomDraw(SplitMode):
    """Each rank draws for the whole tensor and keeps its own part."""

    @staticmethod
    def match(call: CallOnLine) -> SplitMode | CannotSplit | None:
        if not isinstance(call.axes.how, how.Draw):
            return None
        found = split_by_labels(call)
        return RandomDraw(operands=found.operands) if isinstance(found, Labelled) else found

    def emit(self, call: LocalCall) -> Node:
        node, like, tokens = call.node, call.call.operands[0].meta["val"], call.result
        given = (call.operands[0], call.local.index(tokens))
        place = (tokens.dim, tokens.outer, tokens.inner)
        where = (list(like.shape), list(like.stride()), *place)
        if node.target is aten.dropout.default:
            return call.emit(random_draws.dropout, *given, call.call["p"], *where)
        settings = (node.target, list(node.args[1:]), dict(node.kwargs))
        return call.emit(random_draws.draw, *given, *settings, *where)
