"""Which attentions can be split: labels say how, and the strategy moves what crosses.

``ringfx.passes.rewrite.local`` emits them, as it knows the strategies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ringfx.ir.attention_spec import AttentionSpec
from ringfx.ops import attention
from ringfx.passes.axes import how
from ringfx.passes.split_modes.labelled import split_by_labels
from ringfx.passes.split_modes.local_attention import LocalAttention
from ringfx.passes.split_modes.mode import CallOnLine, CannotSplit, SplitMode
from ringfx.passes.split_modes.placement import Placement
from ringfx.passes.token_axes.few_queries import has_few_queries
from ringfx.passes.token_axes.token_line import TokenDim
from ringfx.passes.token_axes.windows import can_move

__all__ = ["OwnKeys", "match_attention"]

NOT_TOKENS = CannotSplit("its queries or keys are only a part of a token axis, or one token")


@dataclass(frozen=True, kw_only=True)
class OwnKeys(SplitMode):
    """Few queries, of which every rank has all, over its own keys (``strategies.split_kv``).

    The operator merges what the ranks have, so that its result and the gradient of its queries are
    complete.
    """

    is_partial_sum: ClassVar[bool] = True

    @staticmethod
    def of(call: CallOnLine) -> OwnKeys | CannotSplit:
        keys = [x for x in call.operands[1:3] if call.on_line(x)]
        if not keys:
            return CannotSplit("every rank attends with all of its few queries")
        together = len(keys) == 2 and keys[0].member == keys[1].member
        if not together or not all(_is_attended(call, i) for i in (1, 2)):
            return NOT_TOKENS
        others = (Placement.REPLICATED,) * (len(call.operands) - 3)
        return OwnKeys(
            operands=(Placement.REPLICATED, Placement.SHARDED, Placement.SHARDED, *others)
        )


def match_attention(call: CallOnLine) -> SplitMode | CannotSplit | None:
    if not isinstance(call.axes.how, how.Attend):
        return None
    local = LocalAttention.match(call)
    if local is not None:
        return local
    if call.node.target is attention and has_few_queries(call.node):
        return OwnKeys.of(call)
    if not _attends_lines(call, call.axes.how):
        return NOT_TOKENS
    return split_by_labels(call)


def _attends_lines(call: CallOnLine, family: how.Attend) -> bool:
    """Whether it is given lines of one layout: all of them, or windows that its mask can name."""
    given = [i for i, x in enumerate(call.axes.operands) if x and i not in family.captured]
    if not all(_is_attended(call, i) for i in given):
        return False
    tokens = [x for i in given if isinstance(x := call.operands[i], TokenDim)]
    kinds = {call.lines.lines[x.line].layout.kind for x in tokens}
    keys = {x.member for x in call.operands[1:3] if isinstance(x, TokenDim)}
    return len(kinds) == 1 and len(keys) == 1


def _is_attended(call: CallOnLine, i: int) -> bool:
    """Whether an operand has a line as its tokens, or a window that the mask can name."""
    tokens, labels = call.operands[i], call.axes.operands[i]
    assert isinstance(call.axes.how, how.Attend)
    assert labels is not None
    if not isinstance(tokens, TokenDim) or not set(labels[tokens.dim]) <= call.axes.how.tokens:
        return False
    if tokens.outer != 1 or tokens.member.is_sorted:
        return False
    line = call.lines.lines[tokens.line]
    complete = tokens.member.length * tokens.inner == line.attended(tokens.inner)
    return complete or can_move(AttentionSpec.from_json(call.call["spec"]))
