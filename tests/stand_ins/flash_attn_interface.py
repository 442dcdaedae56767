"""A stand-in of FlashAttention 3: its real signatures, flash-attn 2's definition inside."""

from flash_attn.flash_attn_interface import _answer, _batched, _packed


def flash_attn_func(
    q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
    v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1,
    pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
):  # fmt: skip
    found = _batched(
        "3: flash_attn_func", q, k, v, None, causal, window_size, softmax_scale, softcap, 0.0
    )
    return _answer(*found, return_attn_probs)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None,
    seqused_k=None, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
    v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1,
    pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
):  # fmt: skip
    found = _packed(
        "3: flash_attn_varlen_func", q, k, v, cu_seqlens_q, cu_seqlens_k, None, causal,
        window_size, softmax_scale, softcap, 0.0,
    )  # fmt: skip
    return _answer(*found, return_attn_probs)


def flash_attn_qkvpacked_func(
    qkv, softmax_scale=None, causal=False, q_descale=None, k_descale=None, v_descale=None,
    window_size=(-1, -1), attention_chunk=0, softcap=0.0, deterministic=False, num_heads_q=None,
    sm_margin=0, return_attn_probs=False,
):  # fmt: skip
    if qkv.dim() == 5:
        q, k, v = qkv.unbind(-3)
    else:
        kv_heads = (qkv.shape[2] - num_heads_q) // 2
        q, k, v = qkv.split([num_heads_q, kv_heads, kv_heads], -2)
    found = _batched(
        "3: flash_attn_qkvpacked_func", q, k, v, None, causal, window_size, softmax_scale,
        softcap, 0.0,
    )  # fmt: skip
    return _answer(*found, return_attn_probs)
