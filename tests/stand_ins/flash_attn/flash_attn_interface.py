"""Signatures of flash-attn 2; see dense_definition.py for what they compute."""

import torch
from dense_definition import CALLS, Opaque, band, dense


def _one(q, k, v, slopes, causal, window_size, softmax_scale, softcap, dropout_p):
    """[M, H, D] of one sequence: (out, logsumexp)."""
    m, n = q.shape[0], k.shape[0]
    left, right = window_size
    allowed = band(m, n, left, 0 if causal else right, n - m)
    bias = None
    if slopes is not None:
        far = torch.tensor([[abs(i + n - m - j) for j in range(n)] for i in range(m)])
        bias = -slopes[:, None, None] * far.reshape(m, n)
    return dense(
        q, k, v, scale=softmax_scale, allowed=allowed, bias=bias, soft_cap=softcap,
        dropout=dropout_p,
    )  # fmt: skip


def _answer(out, lse, return_attn_probs):
    return (out, lse, None) if return_attn_probs else out


def _batched(name, q, k, v, slopes, *options):
    def run(q, k, v):
        CALLS.append(name)
        found = [
            _one(q[b], k[b], v[b], slopes if slopes is None or slopes.dim() == 1 else slopes[b],
                 *options)
            for b in range(q.shape[0])
        ]  # fmt: skip
        return torch.stack([o for o, _ in found]), torch.stack([s for _, s in found])

    return Opaque.apply(run, q, k, v)


def _packed(name, q, k, v, cu_q, cu_k, slopes, *options):
    def run(q, k, v):
        CALLS.append(name)
        outs, starts_q, starts_k = [], cu_q.tolist(), cu_k.tolist()
        for d in range(len(starts_q) - 1):
            sq, sk = slice(starts_q[d], starts_q[d + 1]), slice(starts_k[d], starts_k[d + 1])
            own = slopes if slopes is None or slopes.dim() == 1 else slopes[d]
            outs.append(_one(q[sq], k[sk], v[sk], own, *options))
        return torch.cat([o for o, _ in outs]), torch.cat([s for _, s in outs], -1)

    return Opaque.apply(run, q, k, v)


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    found = _batched(
        "flash_attn_func", q, k, v, alibi_slopes, causal, window_size, softmax_scale, softcap,
        dropout_p,
    )  # fmt: skip
    return _answer(*found, return_attn_probs)


def flash_attn_qkvpacked_func(
    qkv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    found = _batched(
        "flash_attn_qkvpacked_func", qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], alibi_slopes,
        causal, window_size, softmax_scale, softcap, dropout_p,
    )  # fmt: skip
    return _answer(*found, return_attn_probs)


def flash_attn_kvpacked_func(
    q, kv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    found = _batched(
        "flash_attn_kvpacked_func", q, kv[:, :, 0], kv[:, :, 1], alibi_slopes, causal,
        window_size, softmax_scale, softcap, dropout_p,
    )  # fmt: skip
    return _answer(*found, return_attn_probs)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    found = _packed(
        "flash_attn_varlen_func", q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, causal,
        window_size, softmax_scale, softcap, dropout_p,
    )  # fmt: skip
    return _answer(*found, return_attn_probs)


def flash_attn_varlen_qkvpacked_func(
    qkv, cu_seqlens, max_seqlen, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
    return_attn_probs=False,
):  # fmt: skip
    found = _packed(
        "flash_attn_varlen_qkvpacked_func", qkv[:, 0], qkv[:, 1], qkv[:, 2], cu_seqlens,
        cu_seqlens, alibi_slopes, causal, window_size, softmax_scale, softcap, dropout_p,
    )  # fmt: skip
    return _answer(*found, return_attn_probs)


def flash_attn_varlen_kvpacked_func(
    q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):  # fmt: skip
    found = _packed(
        "flash_attn_varlen_kvpacked_func", q, kv[:, 0], kv[:, 1], cu_seqlens_q, cu_seqlens_k,
        alibi_slopes, causal, window_size, softmax_scale, softcap, dropout_p,
    )  # fmt: skip
    return _answer(*found, return_attn_probs)
