"""Calls that labels alone describe: each rank runs the operator on its own tokens."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import Node

from ringfx.passes.axes import how
from ringfx.passes.axes.call import AxisSharing
from ringfx.passes.split_modes.local_call import LocalCall, local_shape
from ringfx.passes.split_modes.mode import CallOnLine, CannotSplit, SplitMode
from ringfx.passes.split_modes.partial_sum import PartialSum
from ringfx.passes.split_modes.placement import Placement
from ringfx.passes.token_axes.token_line import NotShardable, TokenDim
from ringfx.torch_compat.operators import schema_of

__all__ = ["Creation", "Labelled", "split_by_labels"]


@dataclass(frozen=True, kw_only=True)
class Labelled(SplitMode):
    """Every sharded label of the operands lives on in the results."""

    is_token_local: ClassVar[bool] = True

    @staticmethod
    def match(call: CallOnLine) -> SplitMode | CannotSplit | None:
        return split_by_labels(call)

    def emit(self, call: LocalCall) -> Node:
        new = call.copy()
        if isinstance(call.axes.how, how.SizeArgument):
            shape = list(local_shape(call.local.lines, call.node))
            _set_argument(new, call.node, call.axes.how.name, shape)
        return new


@dataclass(frozen=True, kw_only=True)
class Creation(Labelled):
    """A constant reads no values: each rank makes its own part."""

    is_token_local: ClassVar[bool] = False

    @staticmethod
    def match(call: CallOnLine) -> SplitMode | CannotSplit | None:
        reads = any(labels is not None for labels in call.axes.operands)
        if reads or not isinstance(call.axes.how, how.SizeArgument):
            return None
        return Creation(operands=(Placement.RANK_LOCAL,) * len(call.operands))


def split_by_labels(call: CallOnLine) -> Labelled | PartialSum | CannotSplit:
    """What the rule's labels allow: run on the tokens as they are, or a partial sum."""
    axes = call.axes
    captured: Collection[int] = axes.how.captured if isinstance(axes.how, how.Attend) else ()
    placements: list[Placement] = []
    active: set[str] = set()
    for i, (tokens, labels) in enumerate(zip(call.operands, axes.operands, strict=True)):
        if isinstance(tokens, NotShardable) and labels is not None and i not in captured:
            return CannotSplit("the token axis appears twice (or regrouped) in one of its operands")
        names = labels[tokens.dim] if labels and isinstance(tokens, TokenDim) else ()
        sharded = (
            call.on_line(tokens)
            and len(names) == 1
            and axes.share_of(names[0]) is not AxisSharing.NEEDS_ALL
        )
        unsplit = Placement.REPLICATED if i in captured else Placement.REPLICATED_PARTIAL_GRAD
        placements.append(Placement.SHARDED if sharded else unsplit)
        active |= set(names) if sharded else set()
    return _with_results(call, tuple(placements), active)


def _with_results(
    call: CallOnLine, placements: tuple[Placement, ...], active: set[str]
) -> Labelled | PartialSum | CannotSplit:
    axes = call.axes
    reason = axes.reason or "it needs all tokens"
    made: set[str] = set()
    for result, labels in zip(call.results, axes.results, strict=True):
        if not call.on_line(result):
            continue
        # Of a dimension (tokens, copies) only the tokens are sharded.
        names = [n for n in labels[result.dim] if n in active] or labels[result.dim]
        if any(axes.share_of(n) is not AxisSharing.INDEPENDENT for n in names):
            return CannotSplit(reason)
        made |= set(names)
    summed = {n for n in active if axes.share_of(n) is AxisSharing.PARTIAL_SUM}
    together = axes.how.tokens if isinstance(axes.how, how.Attend) else frozenset()
    if not active and not made:
        return CannotSplit(reason)
    if summed and made:
        return CannotSplit("it both sums over tokens and keeps them")
    if len(summed) > 1 or (len(active - summed) > 1 and not active <= together):
        return CannotSplit("two of its dimensions are the token axis")
    if summed:
        return PartialSum(operands=placements)
    if not active - made <= together:
        return CannotSplit(reason)
    return Labelled(operands=placements)


def _set_argument(new: Node, node: Node, name: str, value: Any) -> None:
    if name in new.kwargs:
        new.kwargs = {**new.kwargs, name: value}
        return
    names = [a.name for a in schema_of(node.target).arguments]
    new.update_arg(names.index(name), value)
