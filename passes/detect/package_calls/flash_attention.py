"""The calls of the package flash-attn (2 and 3), with its own signatures.

Semantics, from the package's documentation: causal and windows are aligned bottom-right, a query
without keys gives 0, ALiBi adds ``-slope * |i + keys - queries - j|``, windows are inclusive and
-1 means none. A call that cannot be written in plain torch breaks the graph, and the package runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ringfx.passes.detect.package_calls.dense import (
    Pairs,
    attend,
    in_documents,
    logsumexp,
    positions,
    window,
)
from ringfx.torch_compat.dynamo import graph_break

__all__ = ["FLASH_2", "FLASH_3"]

Result = Tensor | tuple[Tensor, ...]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """q [batch, queries, heads, dim], k and v [batch, keys, key heads, dim]."""
    pairs = positions(q.shape[1], k.shape[1], q.device)
    return _masked(
        q, k, v, pairs, softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_p,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """qkv [batch, tokens, 3, heads, dim]."""
    q, k, v = qkv.unbind(2)
    pairs = positions(q.shape[1], k.shape[1], q.device)
    return _masked(
        q, k, v, pairs, softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_p,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """q [batch, queries, heads, dim], kv [batch, keys, 2, key heads, dim]."""
    k, v = kv.unbind(2)
    pairs = positions(q.shape[1], k.shape[1], q.device)
    return _masked(
        q, k, v, pairs, softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_p,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """q [all queries, heads, dim], k and v [all keys, key heads, dim], packed documents."""
    if block_table is not None:
        _keep_the_package("flash_attn_varlen_func", "reads keys from pages (block_table)")
    same = cu_seqlens_q is cu_seqlens_k and q.shape[0] == k.shape[0]
    pairs = in_documents(cu_seqlens_q, cu_seqlens_k, q.shape[0], k.shape[0], same=same)
    return _packed(
        q, k, v, pairs, softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_p,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """qkv [all tokens, 3, heads, dim]."""
    q, k, v = qkv.unbind(1)
    pairs = in_documents(cu_seqlens, cu_seqlens, q.shape[0], k.shape[0], same=True)
    return _packed(
        q, k, v, pairs, softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_p,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """q [all queries, heads, dim], kv [all keys, 2, key heads, dim]."""
    k, v = kv.unbind(1)
    same = cu_seqlens_q is cu_seqlens_k and q.shape[0] == k.shape[0]
    pairs = in_documents(cu_seqlens_q, cu_seqlens_k, q.shape[0], k.shape[0], same=same)
    return _packed(
        q, k, v, pairs, softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_p,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_3_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Result:
    """FlashAttention 3: q [batch, queries, heads, dim]."""
    if qv is not None or attention_chunk or q_descale is not None or k_descale is not None:
        _keep_the_package("flash_attn_func", "uses qv, descaling or attention_chunk")
    pairs = positions(q.shape[1], k.shape[1], q.device)
    found = _masked(
        q, k, v, pairs, softmax_scale, causal, window_size, softcap, None, 0.0, return_attn_probs
    )
    return found[:2] if isinstance(found, tuple) else found


def flash_attn_3_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Result:
    """FlashAttention 3, packed documents."""
    if qv is not None or attention_chunk or q_descale is not None or k_descale is not None:
        _keep_the_package("flash_attn_varlen_func", "uses qv, descaling or attention_chunk")
    if seqused_q is not None or seqused_k is not None:
        _keep_the_package("flash_attn_varlen_func", "uses a part of its packed tokens")
    same = cu_seqlens_q is cu_seqlens_k and q.shape[0] == k.shape[0]
    pairs = in_documents(cu_seqlens_q, cu_seqlens_k, q.shape[0], k.shape[0], same=same)
    found = _packed(
        q, k, v, pairs, softmax_scale, causal, window_size, softcap, None, 0.0, return_attn_probs
    )
    return found[:2] if isinstance(found, tuple) else found


def flash_attn_3_qkvpacked_func(
    qkv: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Result:
    """qkv [batch, tokens, 3, heads, dim], or [batch, tokens, all heads, dim]."""
    if qkv.dim() == 5:
        q, k, v = qkv.unbind(2)
    else:
        assert num_heads_q is not None, "num_heads_q says how packed heads are divided"
        kv_heads = (qkv.shape[2] - num_heads_q) // 2
        q, k, v = qkv.split([num_heads_q, kv_heads, kv_heads], dim=2)
    return flash_attn_3_func(
        q, k, v, softmax_scale, causal, None, q_descale, k_descale, v_descale, window_size,
        attention_chunk, softcap, return_attn_probs=return_attn_probs,
    )  # fmt: skip


def _packed(q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, *options: Any) -> Result:
    found = _masked(q[None], k[None], v[None], pairs, *options)
    if not isinstance(found, tuple):
        return found[0]
    out, lse, probabilities = found
    return out[0], lse[0], probabilities


def _masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pairs: Pairs,
    scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    soft_cap: float,
    alibi_slopes: Tensor | None,
    dropout: float,
    with_logsumexp: bool,
) -> Result:
    """The output, or (output, logsumexp, no probabilities) as the package returns them.

    Who reads the logsumexp pays for a second product; where nobody does, it is dead code.
    """
    if with_logsumexp and dropout:
        _keep_the_package("flash-attn", "returns its attention weights under dropout")
    left: int | None = window_size[0] if window_size[0] >= 0 else None
    right: int | None = window_size[1] if window_size[1] >= 0 else None
    if causal:
        right = 0
    bias = None
    if alibi_slopes is not None:
        bias = -alibi_slopes[..., None, None] * (pairs.q - pairs.k).abs()
    keep = window(pairs, left, right)
    out = attend(q, k, v, keep=keep, bias=bias, scale=scale, dropout=dropout, soft_cap=soft_cap)
    if not with_logsumexp:
        return out
    return out, logsumexp(q, k, keep, bias, scale, soft_cap), q.new_empty(0)


def _keep_the_package(name: str, reason: str) -> None:
    graph_break(msg=f"{name} {reason}: the package's own function runs")


FLASH_2: Mapping[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (
        flash_attn_func,
        flash_attn_qkvpacked_func,
        flash_attn_kvpacked_func,
        flash_attn_varlen_func,
        flash_attn_varlen_qkvpacked_func,
        flash_attn_varlen_kvpacked_func,
    )
}
FLASH_3: Mapping[str, Callable[..., Any]] = {
    "flash_attn_func": flash_attn_3_func,
    "flash_attn_varlen_func": flash_attn_3_varlen_func,
    "flash_attn_qkvpacked_func": flash_attn_3_qkvpacked_func,
}
