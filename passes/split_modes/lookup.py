"""Elements of the tokens by their number: each from the rank that has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from ringfx.comm import token_lookup
from ringfx.passes.axes import how
from ringfx.passes.axes.call import AxisSharing, Call, result_values
from ringfx.passes.split_modes.local_call import LocalCall
from ringfx.passes.split_modes.mode import CallOnLine, CannotSplit, SplitMode
from ringfx.passes.split_modes.placement import Placement

__all__ = ["LookUp", "TakeRange", "TokensByNumber"]

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class TokensByNumber(SplitMode):
    """The owners' rows, summed with the zeros of all other ranks."""

    is_partial_sum: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class TakeRange(TokensByNumber):
    """A range of tokens that is known in advance."""

    start: int
    length: int

    @staticmethod
    def match(call: CallOnLine) -> TakeRange | CannotSplit | None:
        """One element of the tokens."""
        source, axes = call.source, call.axes
        if not isinstance(axes.how, how.Pick) or not call.on_line(source):
            return None
        labels = axes.operands[0]
        assert labels is not None
        if axes.share_of(labels[source.dim][0]) is not AxisSharing.PARTIAL_SUM:
            return None
        if source.outer * source.inner != 1:
            return CannotSplit("it picks elements of a dimension that holds more than tokens")
        return TakeRange.of(call, axes.how.element, 1)

    @staticmethod
    def of(call: CallOnLine, start: int, length: int) -> TakeRange:
        placements = (Placement.SHARDED, *call.rest(Placement.REPLICATED_PARTIAL_GRAD))
        return TakeRange(operands=placements, start=start, length=length)

    def emit(self, call: LocalCall) -> Node:
        source, given = call.source, call.call
        own, length = call.local.own(source), source.member.length
        where = (own, self.start, self.length, length, source.dim)
        row = call.emit(token_lookup.take_range, call.operands[0], *where)
        if len(given.result_shape) != len(given.shapes[0]):
            row = call.emit(aten.squeeze.dim, row, source.dim)
        return call.local.reduce(call.node, row)


@dataclass(frozen=True, kw_only=True)
class LookUp(TokensByNumber):
    """Tokens whose numbers another operand holds."""

    by: int
    """The operand that holds the numbers."""

    @staticmethod
    def match(call: CallOnLine) -> LookUp | None:
        """Unless numbers and results follow a line themselves, and are many."""
        family, (source, *rest) = call.axes.how, call.operands or (None,)
        if not isinstance(family, how.Lookup) or not call.on_line(source):
            return None
        few = 2 * _num_elements(call.node) <= _num_elements(call.node.all_input_nodes[0])
        if not few and any(tokens is not None for tokens in (*rest, *call.results)):
            return None
        labels = call.axes.operands[0]
        assert labels is not None
        names = labels[source.dim]
        if len(names) != 1 or names[0] not in family.numbers:
            return None
        if any(v.dtype == torch.bool for v in result_values(call.node)):
            return None
        placements = (Placement.SHARDED, *call.rest(Placement.REPLICATED_PARTIAL_GRAD))
        return LookUp(operands=placements, by=family.numbers[names[0]])

    def emit(self, call: LocalCall) -> Node:
        source = call.source
        own, length = call.local.own(source), source.member.length
        rows = call.emit(
            token_lookup.local_rows, call.operands[self.by], own, length, source.outer,
            source.inner,
        )  # fmt: skip
        safe = call.emit(aten.clamp_min.default, rows, 0)
        operands = [safe if i == self.by else n for i, n in enumerate(call.operands)]
        taken = call.with_operands(operands).copy()
        trailing = _trailing(call.call, self.by, source.dim)
        masked = call.emit(token_lookup.mask_rows, taken, rows, trailing)
        return call.local.reduce(call.node, masked)


def _num_elements(node: Node) -> int:
    return sum(v.numel() for v in result_values(node))


def _trailing(call: Call, by: int, dim: int) -> int:
    """Dimensions of the result after those of the operand that holds the numbers."""
    result, numbers = call.result_shape, call.shapes[by]
    if call.node.target is aten.gather.default:
        return 0
    if call.node.target is aten.index_select.default:
        return len(result) - 1 - dim
    given = list(call["indices"])
    at = [d for d, i in enumerate(given) if i is not None]
    first = at[0] if at == list(range(at[0], at[-1] + 1)) else 0
    picked = max(len(given[d].meta["val"].shape) for d in at)
    assert len(numbers) <= picked
    return len(result) - first - picked
