"""Attention over channels (cross-covariance): scores of features with features, tokens summed.

``softmax(k.T @ q)`` of k, q [tokens, channels] has a row for each channel, and each score is a sum
over all tokens. What ranks must exchange is those sums, [channels, channels], and nothing that has
tokens. So it is no attention that a strategy computes: it stays, or is, written out, and is split
as its products are. Its channels must not be taken for tokens, whose place they have.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from ringfx.passes.axes.call import Call
from ringfx.passes.detect.inline_kernel_calls import inline
from ringfx.passes.detect.names import Names
from ringfx.passes.detect.program import Program
from ringfx.passes.detect.roles import Roles

__all__ = ["CHANNELS", "is_over_channels", "write_out"]

aten = torch.ops.aten

CHANNELS = (
    "it weighs channels by one another and sums over the tokens: it is split as its products are, "
    "and ranks add up their scores"
)

NARROW = frozenset({torch.float16, torch.bfloat16})


def is_over_channels(program: Program, names: Names, roles: Roles) -> bool:
    """Whether both sides of the scores are features, and what they are summed over is none."""
    origins = names.origins()
    features = program.feature_axes

    def are_features(axes: tuple[int, ...]) -> list[bool]:
        return [bool(origins.get(a, set()) & features) for a in axes]

    summed = [a for dim in roles.contracted for a in dim if roles.sizes[a] > 1]
    return (
        bool(summed)
        and not any(are_features(tuple(summed)))
        and all(are_features((*roles.queries, *roles.keys)))
    )


def write_out(nodes: Sequence[Node]) -> bool:
    """Put products in the place of calls of scaled dot product attention; whether any was."""
    calls = [n for n in nodes if n.target is aten.scaled_dot_product_attention.default]
    for node in calls:
        made = inline(node, _written_out, named=False, **Call(node).arguments)
        node.replace_all_uses_with(made)
        node.graph.erase_node(node)
    return bool(calls)


def _written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Scores in float32 at least, as the kernels have them; a row without keys gives 0."""
    wide = torch.float32 if query.dtype in NARROW else query.dtype
    if enable_gqa and query.shape[-3] != key.shape[-3]:
        copies = query.shape[-3] // key.shape[-3]
        key, value = (x.repeat_interleave(copies, -3) for x in (key, value))
    by = query.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.matmul(query.to(wide), key.to(wide).transpose(-2, -1)) * by
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is None:
        weights = scores.softmax(-1)
    else:
        is_choice = attn_mask.dtype == torch.bool
        hidden = scores.masked_fill(~attn_mask, -torch.inf) if is_choice else scores + attn_mask
        weights = aten._safe_softmax.default(hidden, -1)
    dropped = F.dropout(weights, dropout_p) if dropout_p else weights
    return torch.matmul(dropped.to(value.dtype), value)
