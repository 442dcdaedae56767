"""Which attentions can be split: labels say how, and the strategy moves what crosses.

``ringfx.passes.rewrite.local`` emits them, as it knows the strategies.
"""

from __future__ import annotations

from ringfx.ir.attention_spec import AttentionSpec
from ringfx.passes.axes import how
from ringfx.passes.split_modes.labelled import split_by_labels
from ringfx.passes.split_modes.mode import CallOnLine, CannotSplit, SplitMode
from ringfx.passes.token_axes.token_line import TokenDim
from ringfx.passes.token_axes.windows import can_move

__all__ = ["match_attention"]


def match_attention(call: CallOnLine) -> SplitMode | CannotSplit | None:
    if not isinstance(call.axes.how, how.Attend):
        return None
    if not _attends_lines(call, call.axes.how):
        return CannotSplit("its queries or keys are only a part of a token axis, or one token")
    return split_by_labels(call)


def _attends_lines(call: CallOnLine, family: how.Attend) -> bool:
    """Whether it is given lines of one layout: all of them, or windows that its mask can name."""
    kinds = set()
    for i, (tokens, labels) in enumerate(zip(call.operands, call.axes.operands, strict=True)):
        if labels is None or i in family.captured:
            continue
        if not isinstance(tokens, TokenDim) or not set(labels[tokens.dim]) <= family.tokens:
            return False
        line = call.lines.lines[tokens.line]
        complete = tokens.member.length * tokens.inner == line.attended(tokens.inner)
        if tokens.outer != 1 or tokens.member.is_sorted:
            return False
        if not complete and not can_move(AttentionSpec.from_json(call.call["spec"])):
            return False
        kinds.add(line.layout.kind)
    keys = {x.member for x in call.operands[1:3] if isinstance(x, TokenDim)}
    return len(kinds) == 1 and len(keys) == 1
