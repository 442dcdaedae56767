"""Rows that are sorted, computed with and put back: each rank does so among its own.

Which calls those are says ``ringfx.passes.axes.routing``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

from ringfx.passes.axes import how
from ringfx.passes.axes.routing import is_grouped
from ringfx.passes.split_modes.labelled import split_by_labels
from ringfx.passes.split_modes.local_call import LocalCall
from ringfx.passes.split_modes.mode import CallOnLine, CannotSplit, SplitMode
from ringfx.passes.split_modes.placement import Placement
from ringfx.passes.split_modes.reshape import Reshape
from ringfx.passes.token_axes.token_line import MaybeTokenDim, NotShardable, TokenDim

__all__ = ["GroupedProduct", "InverseOrder", "LocalSort", "match_sorted_rows"]

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class InverseOrder(SplitMode):
    """The inverse of this rank's own order of rows."""

    def emit(self, call: LocalCall) -> Node:
        order = call.operands[1 if call.node.target is aten.index_put.default else 0]
        return call.emit(aten.argsort.default, order)


@dataclass(frozen=True, kw_only=True)
class LocalSort(SplitMode):
    """A sort of rows, and what looks rows up by its order."""

    @staticmethod
    def match(call: CallOnLine) -> LocalSort | InverseOrder | CannotSplit | None:
        route = next((r for r in call.lines.routes if call.node in r.nodes), None)
        if route is None:
            return None
        if call.node in route.inverses:
            return InverseOrder(operands=(Placement.RANK_LOCAL,) * len(call.operands))
        is_count = [n in route.counts for n in call.call.operands]
        tokens = [x for x, counted in zip(call.operands, is_count, strict=True) if not counted]
        unclear = any(isinstance(x, NotShardable) for x in (*call.operands, *call.results))
        if unclear or not all(call.on_line(x) for x in tokens):
            return CannotSplit("it sorts more than the tokens' own rows")
        return LocalSort(
            operands=tuple(
                Placement.RANK_LOCAL if counted else Placement.SHARDED for counted in is_count
            )
        )


@dataclass(frozen=True, kw_only=True)
class GroupedProduct(SplitMode):
    """Sorted rows times the matrix of their group; each rank's groups end at rows of its own."""


def match_sorted_rows(call: CallOnLine) -> SplitMode | CannotSplit | None:
    """A call on sorted rows: what treats each alone, and a product by group."""
    if not any(_is_sorted(tokens) for tokens in (*call.operands, *call.results)):
        return None
    if is_grouped(call.node) and call.call.operands[-1] in set(_counts(call)):
        return GroupedProduct(
            operands=(
                Placement.SHARDED, Placement.REPLICATED_PARTIAL_GRAD, Placement.RANK_LOCAL
            )
        )  # fmt: skip
    if isinstance(call.axes.how, how.Draw):
        return CannotSplit("it draws random numbers in the order of all rows")
    mode = Reshape.match(call) or split_by_labels(call)
    if isinstance(mode, SplitMode) and mode.is_partial_sum:
        return CannotSplit("it sums over sorted rows")
    return mode


def _counts(call: CallOnLine) -> Iterator[Node]:
    for route in call.lines.routes:
        yield from route.counts


def _is_sorted(tokens: MaybeTokenDim) -> bool:
    return isinstance(tokens, TokenDim) and tokens.member.is_sorted
