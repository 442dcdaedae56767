"""Rows for inline_kernel_calls.py: one function for each attention kernel a program may call.

Parameter names are those of the operators' schemas. What has no equal in plain torch is refused
with a ValueError that says why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ringfx.passes.detect.package_calls.dense import Pairs, attend, in_documents, positions, window

__all__ = ["KERNEL_CALLS", "folded", "is_plain"]

aten = torch.ops.aten


def is_plain(q: torch.Size, k: torch.Size, v: torch.Size) -> bool:
    """Whether SDPA operands are [B, S, D] or [B, H, S, D] with key heads that divide the heads."""
    if not len(q) == len(k) == len(v) or len(q) not in (3, 4):
        return False
    if q[0] < max(k[0], v[0]):
        return False
    return len(q) == 3 or (k[1] == v[1] and (q[1] == k[1] or (k[1] > 0 and q[1] % k[1] == 0)))


def folded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """SDPA on operands of any rank, which broadcast, as one on [batch, heads, tokens, dim]."""
    tensors = (query, key, value)
    rank = max(4, *(x.dim() for x in tensors))
    q, k, v = (x[(None,) * (rank - x.dim())] for x in tensors)
    lead = torch.broadcast_shapes(*(x.shape[:-3] for x in (q, k, v)))
    heads = [q.shape[-3], k.shape[-3], v.shape[-3]]
    if not enable_gqa and (heads[1] != heads[2] or heads[1] not in (1, heads[0])):
        heads = [max(heads)] * 3
    q, k, v = (
        x.expand(*lead, n, *x.shape[-2:]).reshape(lead.numel(), n, *x.shape[-2:])
        for x, n in zip((q, k, v), heads, strict=True)
    )
    mask = None if attn_mask is None else _folded_mask(attn_mask, lead)
    out = F.scaled_dot_product_attention(
        q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=heads[0] != heads[1]
    )
    out = out.reshape(*lead, *out.shape[1:])
    return out.reshape(out.shape[rank - max(x.dim() for x in tensors) :])


def _folded_mask(mask: Tensor, lead: torch.Size) -> Tensor:
    """A mask that broadcasts over the leading dimensions as one over their product."""
    rank = len(lead) + 3
    mask = mask[(None,) * (rank - mask.dim())]
    if mask.shape[: len(lead)].numel() == 1:
        return mask.reshape(1, *mask.shape[-3:])
    return mask.expand(*lead, *mask.shape[-3:]).reshape(lead.numel(), *mask.shape[-3:])


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    scale: float | None,
) -> Tensor:
    """CUDA's flash kernel, [batch, heads, tokens, dim]."""
    _square_if_causal(is_causal, query.shape[-2], key.shape[-2])
    return _sdpa(query, key, value, None, dropout_p, is_causal, scale)


def flash_for_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float,
    is_causal: bool,
    attn_mask: Tensor | None,
    scale: float | None,
) -> Tensor:
    return _sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale)


def efficient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    return _sdpa(query, key, value, attn_bias, dropout_p, is_causal, scale)


def cudnn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    scale: float | None,
) -> Tensor:
    _square_if_causal(is_causal, query.shape[-2], key.shape[-2])
    return _sdpa(query, key, value, attn_bias, dropout_p, is_causal, scale)


def overrideable(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    scale: float | None,
) -> Tensor:
    """The slot of out-of-tree devices."""
    _square_if_causal(is_causal, query.shape[-2], key.shape[-2])
    return _sdpa(query, key, value, attn_bias, dropout_p, is_causal, scale)


def math_(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    dropout_mask: Tensor | None,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    if dropout_mask is not None:
        raise ValueError("it is given its dropout mask, which a split attention does not accept")
    return folded(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def packed_flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    scale: float | None,
    window_size_left: int | None,
    window_size_right: int | None,
    seqused_k: Tensor | None,
    alibi_slopes: Tensor | None,
    **more: Any,
) -> Tensor:
    """The kernel under SDPA, [batch, tokens, heads, dim] or packed; aligned bottom-right."""
    if seqused_k is not None or more.get("block_table") is not None:
        raise ValueError("it reads a part of its keys (seqused_k) or pages of them (block_table)")
    left = window_size_left if window_size_left is not None and window_size_left >= 0 else None
    right = window_size_right if window_size_right is not None and window_size_right >= 0 else None
    q, k, v, pairs = _packed_pairs(query, key, value, cum_seq_q, cum_seq_k)
    bias = None
    if alibi_slopes is not None:
        bias = -alibi_slopes[..., None, None] * (pairs.q - pairs.k).abs()
    keep = window(pairs, left, 0 if is_causal else right)
    out = attend(q, k, v, keep=keep, bias=bias, scale=scale, dropout=dropout_p)
    return out if cum_seq_q is None else out[0]


def packed_efficient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    dropout_p: float,
    custom_mask_type: int,
    compute_log_sumexp: bool,
    scale: float | None,
    seqlen_k: Tensor | None,
    window_size: int | None,
) -> Tensor:
    """[batch, tokens, heads, dim]; packed documents lie in one batch entry."""
    if seqlen_k is not None:
        raise ValueError("it reads a part of its keys (seqlen_k)")
    bottom_right = custom_mask_type == FROM_BOTTOM_RIGHT
    if cu_seqlens_q is None or cu_seqlens_k is None:
        pairs = positions(query.shape[1], key.shape[1], query.device, bottom_right=bottom_right)
    else:
        pairs = in_documents(
            cu_seqlens_q, cu_seqlens_k, query.shape[1], key.shape[1],
            same=cu_seqlens_q is cu_seqlens_k, bottom_right=bottom_right,
        )  # fmt: skip
    left = window_size - 1 if window_size else None
    keep = window(pairs, left, 0 if custom_mask_type else None)
    return attend(query, key, value, keep=keep, bias=bias, scale=scale, dropout=dropout_p)


FROM_BOTTOM_RIGHT = 2
"""Of ``custom_mask_type``: 0 none, 1 causal aligned top-left, 2 causal aligned bottom-right."""


def _packed_pairs(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Pairs]:
    if cu_q is None or cu_k is None:
        return q, k, v, positions(q.shape[1], k.shape[1], q.device)
    same = cu_q is cu_k and q.shape[0] == k.shape[0]
    pairs = in_documents(cu_q, cu_k, q.shape[0], k.shape[0], same=same)
    return q[None], k[None], v[None], pairs


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
) -> Tensor:
    return F.scaled_dot_product_attention(
        q, k, v, mask, dropout, causal, scale=scale, enable_gqa=q.shape[-3] != k.shape[-3]
    )


def _square_if_causal(causal: bool, q_len: int, k_len: int) -> None:
    if causal and q_len != k_len:
        raise ValueError(
            f"it is causal with {q_len} queries and {k_len} keys, which this kernel aligns "
            "bottom-right and scaled_dot_product_attention top-left. Do: pass a mask"
        )


KERNEL_CALLS: Mapping[object, Callable[..., Tensor]] = {
    aten._scaled_dot_product_flash_attention.default: flash,
    aten._scaled_dot_product_flash_attention_for_cpu.default: flash_for_cpu,
    aten._scaled_dot_product_efficient_attention.default: efficient,
    aten._scaled_dot_product_cudnn_attention.default: cudnn,
    aten._scaled_dot_product_fused_attention_overrideable.default: overrideable,
    aten._scaled_dot_product_attention_math.default: math_,
    aten._flash_attention_forward.default: packed_flash,
    aten._efficient_attention_forward.default: packed_efficient,
}
