"""transformers' way into flash-attn: padding and packing without looking at their values.

The library removes padding and looks for packed documents by reading tensors, which breaks the
graph in every layer. The same attention is masks: padding by key and query, documents by position.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ringfx.passes.detect.package_calls.dense import Pairs, attend, in_documents, positions, window
from ringfx.torch_compat.dynamo import graph_break

__all__ = ["HUGGING_FACE", "HUGGING_FACE_MASKS"]


def _flash_attention_forward(
    query_states: Tensor,
    key_states: Tensor,
    value_states: Tensor,
    attention_mask: Tensor | None,
    query_length: int,
    is_causal: bool,
    dropout: float = 0.0,
    position_ids: Tensor | None = None,
    softmax_scale: float | None = None,
    sliding_window: int | None = None,
    use_top_left_mask: bool = False,
    softcap: float | None = None,
    deterministic: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    target_dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
    block_table: Tensor | None = None,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """[batch, tokens, heads, dim]; ``attention_mask`` [batch, keys] is 0 at padding."""
    if block_table is not None or k_cache is not None or kwargs.get("s_aux") is not None:
        _keep_the_library("pages of keys or sinks")
    if position_ids is not None and position_ids.dim() != 2:
        _keep_the_library("positions of several axes")
    q, k, v = query_states, key_states, value_states
    if target_dtype is not None and q.dtype == torch.float32:
        q, k, v = q.to(target_dtype), k.to(target_dtype), v.to(target_dtype)
    pairs = positions(q.shape[1], k.shape[1], q.device)
    real = None
    if attention_mask is not None:
        pairs, real = _padded(attention_mask, pairs, q.shape[1], k.shape[1])
    elif cu_seq_lens_q is not None and cu_seq_lens_k is not None and max_length_q is not None:
        return _documents(
            q, k, v, cu_seq_lens_q, cu_seq_lens_k, is_causal, softmax_scale, sliding_window,
            softcap, dropout,
        )  # fmt: skip
    elif position_ids is not None and q.shape[0] == 1 and q.shape[1] == k.shape[1] > 1:
        document = (position_ids[0] == position_ids.min()).cumsum(-1)
        pairs = Pairs(pairs.q, pairs.k, document[:, None] == document)
    left, right = _window(sliding_window, k.shape[1])
    if is_causal and not (use_top_left_mask and query_length == 1):
        right = 0
    keep = window(pairs, left, right)
    if real is not None:
        keep = real if keep is None else keep & real
    return attend(q, k, v, keep=keep, scale=softmax_scale, dropout=dropout, soft_cap=softcap or 0.0)


def _padded(mask: Tensor, pairs: Pairs, q_len: int, k_len: int) -> tuple[Pairs, Tensor]:
    """What is real: removing padding in front or behind leaves distances as they are."""
    key = mask[:, None, None, -k_len:].to(torch.bool)
    query = mask[:, None, -q_len:, None].to(torch.bool)
    return pairs, query & key


def _window(size: int | None, k_len: int) -> tuple[int | None, int | None]:
    """The library counts the token itself, flash-attn does not; symmetric unless causal."""
    return (None, None) if size is None or k_len <= size else (size - 1, size - 1)


def _documents(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    causal: bool,
    scale: float | None,
    sliding_window: int | None,
    soft_cap: float | None,
    dropout: float,
) -> Tensor:
    """Documents given by their cumulative lengths, the batch laid end to end."""
    batch = q.shape[0]
    q, k, v = (x.flatten(0, 1)[None] for x in (q, k, v))
    same = cu_q is cu_k and q.shape[1] == k.shape[1]
    pairs = in_documents(cu_q, cu_k, q.shape[1], k.shape[1], same=same)
    left, right = _window(sliding_window, k.shape[1] // batch)
    keep = window(pairs, left, 0 if causal else right)
    out = attend(q, k, v, keep=keep, scale=scale, dropout=dropout, soft_cap=soft_cap or 0.0)
    return out.view(batch, -1, *out.shape[2:])


def _keep_the_library(reason: str) -> None:
    graph_break(msg=f"_flash_attention_forward with {reason}: the library's own function runs")


def flash_attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The padding mask [batch, keys] as it is, without asking whether anything is padding."""
    return None if attention_mask is None else attention_mask[:, -kv_length:]


def fast_all(tensor: Tensor) -> bool:
    """Whether nothing is padding: not asked, since a mask that shows all keys says the same."""
    return False


HUGGING_FACE_MASKS: Mapping[str, Callable[..., Any]] = {
    "flash_attention_mask": flash_attention_mask,
    "fast_all": fast_all,
}
HUGGING_FACE: Mapping[str, Callable[..., Any]] = {
    "_flash_attention_forward": _flash_attention_forward
}
