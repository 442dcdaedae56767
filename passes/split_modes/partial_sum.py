"""Sums over tokens: each rank sums its own, and an all-reduce adds the parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from ringfx.comm import conjugate
from ringfx.passes.axes import how
from ringfx.passes.split_modes.local_call import LocalCall
from ringfx.passes.split_modes.local_graph import is_narrow
from ringfx.passes.split_modes.mode import SplitMode
from ringfx.passes.split_modes.placement import Placement

__all__ = ["PartialSum"]

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class PartialSum(SplitMode):
    """Recognised by labels (``labelled.split_by_labels``)."""

    is_partial_sum: ClassVar[bool] = True
    is_token_local: ClassVar[bool] = True

    def emit(self, call: LocalCall) -> Node:
        family = call.axes.how if isinstance(call.axes.how, how.Sum) else how.Sum()
        filled = self._filled(call, family)
        if family.mean:
            return _mean(filled)
        return call.local.reduce(call.node, _partial(filled))

    def _filled(self, call: LocalCall, family: how.Sum) -> LocalCall:
        """Operands whose padded tokens hold the value that adds nothing."""
        operands = list(call.operands)
        for i, value in enumerate(call.call.operands):
            if i not in family.fill or self.operands[i] is not Placement.SHARDED:
                continue
            tokens = call.tokens_of(value)
            if call.has_padding(tokens):
                where = (tokens.dim, tokens.outer, tokens.inner)
                valid = call.local.valid(tokens)
                operands[i] = call.emit(
                    conjugate.mask_tokens, operands[i], valid, family.fill[i], *where
                )
                call.local.holds_tokens(operands[i], tokens)
        return call.with_operands(operands)


def _mean(call: LocalCall) -> Node:
    """A mean over tokens: the sum over ranks, divided by the global count."""
    given = call.call
    operand, count = call.operands[0], given.shapes[0].numel() // max(given.result_shape.numel(), 1)
    asked = given.get("dtype")
    dtype: dict[str, Any] = _wide(call.node) if asked is None else {"dtype": asked}
    if "dim" in given.arguments and given["dim"] is not None:
        total = call.emit(aten.sum.dim_IntList, operand, given["dim"], given["keepdim"], **dtype)
    else:
        total = call.emit(aten.sum.default, operand, **dtype)
    mean = call.emit(aten.div.Scalar, call.local.total(call.node, total), count)
    return call.local.narrowed(call.node, mean)


def _partial(call: LocalCall) -> Node:
    """This rank's part of a sum: what sums alone is not rounded before all parts are there."""
    made = call.copy()
    sums = call.node.target in (aten.sum.default, aten.sum.dim_IntList)
    if sums and call.call.get("dtype") is None:
        made.kwargs = {**made.kwargs, **_wide(call.node)}
    return made


def _wide(node: Node) -> dict[str, Any]:
    return {"dtype": torch.float32} if is_narrow(node) else {}
