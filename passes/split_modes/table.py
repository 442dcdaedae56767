"""The ways to split a call, in the order in which they are asked; the first answer decides."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from ringfx.passes.split_modes.along_tokens import Flip, Reduction, Scan, Softmax
from ringfx.passes.split_modes.attention import match_attention
from ringfx.passes.split_modes.concat import Concat
from ringfx.passes.split_modes.halo_convolution import HaloConvolution, HaloPool, HaloTransposed
from ringfx.passes.split_modes.labelled import Creation, Labelled
from ringfx.passes.split_modes.local_sort import LocalSort, match_sorted_rows
from ringfx.passes.split_modes.lookup import LookUp, TakeRange
from ringfx.passes.split_modes.mode import CallOnLine, CannotSplit, Match, SplitMode
from ringfx.passes.split_modes.random_draw import RandomDraw
from ringfx.passes.split_modes.reshape import Reshape
from ringfx.passes.split_modes.reshard import Reshard
from ringfx.passes.split_modes.roll import Roll
from ringfx.passes.split_modes.window import Window
from ringfx.passes.token_axes.token_line import Lines, NotShardable, TokenDim

__all__ = ["MODES", "Arrived", "split_mode"]


@dataclass(frozen=True, kw_only=True)
class Arrived(SplitMode):
    """An input that an earlier program left sharded; it is no call."""


def _refuse_unclear(call: CallOnLine) -> CannotSplit | None:
    """Whatever the operator is, these can be split by none of the ways that follow."""
    if call.named.clash:
        return CannotSplit("its dimensions do not line up with the token axis")
    if any(isinstance(result, NotShardable) for result in call.results):
        return CannotSplit("the token axis appears twice (or regrouped) in its output")
    return None


MODES: tuple[Match, ...] = (
    Reshard.match,
    _refuse_unclear,
    LocalSort.match,
    match_sorted_rows,
    Reshape.match,
    TakeRange.match,
    match_attention,
    Creation.match,
    HaloConvolution.match,
    HaloPool.match,
    HaloTransposed.match,
    Roll.match,
    Scan.match,
    Softmax.match,
    Flip.match,
    Reduction.match,
    Concat.match,
    LookUp.match,
    Window.match,
    RandomDraw.match,
    Labelled.match,
)


def split_mode(lines: Lines, node: Node, line: int) -> SplitMode | CannotSplit | None:
    """The mode of a call along one line; None if the call does not touch the line."""
    if node in lines.arrived:
        tokens = lines.token_dim(node)
        return Arrived() if isinstance(tokens, TokenDim) and tokens.line == line else None
    named = lines.axes.ops.get(node)
    if named is None:
        return None
    call = CallOnLine.of(lines, named, line)
    if not call.touches_line:
        return None
    answers = (match(call) for match in MODES)
    return next(answer for answer in answers if answer is not None)
