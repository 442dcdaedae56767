"""Attention in plain torch: what every call of another form is written as.

Masks are comparisons of positions, which mask lifting turns into tile functions: nothing here is
ever as large as queries x keys once ringfx has read it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Pairs", "attend", "documents", "in_documents", "logsumexp", "positions", "window"]


@dataclass(frozen=True, eq=False)
class Pairs:
    """Which pairs of a query and a key an attention is about, by index."""

    q: Tensor
    """[queries, 1]: where each query stands among the keys."""
    k: Tensor
    """[keys]"""
    apart: Tensor | None = None
    """Pairs that can never see each other are false."""


def positions(q_len: int, k_len: int, device: torch.device, *, bottom_right: bool = True) -> Pairs:
    """Query i stands at key i, or with ``bottom_right`` the last query at the last key."""
    q = torch.arange(q_len, device=device)[:, None]
    shift = k_len - q_len if bottom_right else 0
    return Pairs(q + shift if shift else q, torch.arange(k_len, device=device))


def documents(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each of ``total`` packed tokens: its document, and that document's start and end."""
    token = torch.arange(total, device=cu_seqlens.device)
    document = torch.bucketize(token, cu_seqlens[1:], right=True)
    inside = document.clamp(max=cu_seqlens.shape[0] - 2)
    return document, cu_seqlens[inside], cu_seqlens[inside + 1]


def in_documents(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    q_len: int,
    k_len: int,
    *,
    same: bool,
    bottom_right: bool = True,
) -> Pairs:
    """Packed sequences: pairs of one document, positions counted from its end (or its start).

    ``same``: queries and keys are the same tokens, so that plain positions will do.
    """
    of_q, start_q, end_q = documents(cu_seqlens_q, q_len)
    if same:
        token = torch.arange(q_len, device=cu_seqlens_q.device)
        return Pairs(token[:, None], token, of_q[:, None] == of_q)
    of_k, start_k, end_k = documents(cu_seqlens_k, k_len)
    q = torch.arange(q_len, device=cu_seqlens_q.device)
    k = torch.arange(k_len, device=cu_seqlens_k.device)
    q, k = (q - end_q, k - end_k) if bottom_right else (q - start_q, k - start_k)
    return Pairs(q[:, None], k, of_q[:, None] == of_k)


def window(pairs: Pairs, left: int | None, right: int | None) -> Tensor | None:
    """Keys from ``left`` before the query to ``right`` after it; None: without that limit."""
    keep = pairs.apart
    if right is not None:
        after = pairs.k <= (pairs.q + right if right else pairs.q)
        keep = after if keep is None else keep & after
    if left is not None:
        before = pairs.k >= pairs.q - left
        keep = before if keep is None else keep & before
    return keep


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    keep: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    soft_cap: float = 0.0,
) -> Tensor:
    """Attention of [batch, tokens, heads, dim] operands; key heads divide query heads.

    ``keep`` and ``bias`` broadcast to [batch, heads, queries, keys]; ``causal`` is aligned
    top-left. A query that sees no key gets 0.
    """
    if soft_cap:
        if causal:
            pairs = positions(query.shape[1], key.shape[1], query.device, bottom_right=False)
            keep = window(Pairs(pairs.q, pairs.k, keep), None, 0)
        scores = masked_scores(query, key, keep, bias, scale, soft_cap)
        weights = torch.ops.aten._safe_softmax(scores, -1).to(value.dtype)
        weights = F.dropout(weights, dropout)
        v = value.transpose(1, 2)
        return (weights @ _for_each_query_head(v, query.shape[2])).transpose(1, 2)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    mask = keep if bias is None else bias
    if keep is not None and bias is not None:
        mask = bias + torch.zeros_like(bias).masked_fill(~keep, -math.inf)
    out = F.scaled_dot_product_attention(
        q, k, v, mask, dropout, causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)


def logsumexp(
    query: Tensor,
    key: Tensor,
    keep: Tensor | None,
    bias: Tensor | None,
    scale: float | None,
    soft_cap: float,
) -> Tensor:
    """[batch, heads, queries]; infinite for a query without keys, as flash kernels return it."""
    scores = masked_scores(query, key, keep, bias, scale, soft_cap)
    found = torch.logsumexp(scores, -1)
    return torch.where(found == -math.inf, math.inf, found)


def masked_scores(
    query: Tensor,
    key: Tensor,
    keep: Tensor | None,
    bias: Tensor | None,
    scale: float | None,
    soft_cap: float,
) -> Tensor:
    """[batch, heads, queries, keys], -inf where not kept, in float32 or better."""
    q, k = query.transpose(1, 2), key.transpose(1, 2)
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1])
    scores = q @ _for_each_query_head(k, q.shape[1]).transpose(-2, -1) * scale
    if q.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    if soft_cap:
        scores = torch.tanh(scores / soft_cap) * soft_cap
    scores = scores if bias is None else scores + bias
    return scores if keep is None else scores.masked_fill(~keep, -math.inf)


def _for_each_query_head(x: Tensor, heads: int) -> Tensor:
    groups = heads // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)
