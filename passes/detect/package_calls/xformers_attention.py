"""The calls of xformers, with its own signatures and its family of attention biases.

Operands are [batch, tokens, heads, dim], or without heads, or [batch, tokens, groups, heads, dim].
A bias object is known by the name of its class, so that the package need not be imported.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ringfx.passes.detect.package_calls.dense import (
    Pairs,
    attend,
    in_documents,
    positions,
    window,
)
from ringfx.torch_compat.dynamo import graph_break

__all__ = ["XFORMERS"]


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """softmax(scale * query @ key^T + attn_bias) @ value; a bias is a tensor or an object."""
    q, k, v = query, key, value
    if query.dim() == 3:
        q, k, v = query.unsqueeze(2), key.unsqueeze(2), value.unsqueeze(2)
    if query.dim() == 5:
        q, k, v = query.flatten(2, 3), _folded(key), _folded(value)
        if k.shape[2] != v.shape[2]:
            k, v = key.flatten(2, 3), value.flatten(2, 3)
    keep = bias = None
    if isinstance(attn_bias, Tensor):
        bias = _per_head(attn_bias, query.dim())
    elif attn_bias is not None:
        keep, bias = _from_object(attn_bias, q, k)
        bias = None if bias is None else _per_head(bias, query.dim())
    out = attend(q, k, v, keep=keep, bias=bias, scale=scale, dropout=p)
    out = out.reshape(*query.shape[:-1], value.shape[-1])
    return out if output_dtype is None else out.to(output_dtype)


def memory_efficient_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """The same without a gradient of its own."""
    return memory_efficient_attention(
        query, key, value, attn_bias, p, scale, output_dtype=output_dtype
    )


def _folded(x: Tensor) -> Tensor:
    """Groups and heads as one dimension; heads that are one and the same are kept once."""
    return x[:, :, :, 0] if x.shape[3] == 1 or x.stride(3) == 0 else x.flatten(2, 3)


def _per_head(bias: Tensor, rank: int) -> Tensor:
    """[batch, heads, queries, keys] from the form that goes with operands of this rank."""
    if bias.dim() == 5:
        return bias.flatten(1, 2)
    return bias.unsqueeze(1) if bias.dim() == 3 and rank == 3 else bias


def _from_object(mask: Any, q: Tensor, k: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(kept, added) of an xformers bias object."""
    kind = type(mask).__name__
    q_len, k_len, device = q.shape[1], k.shape[1], q.device
    if kind == "LowerTriangularMask":
        return window(positions(q_len, k_len, device, bottom_right=False), None, 0), None
    if kind == "LowerTriangularMaskWithTensorBias":
        pairs = positions(q_len, k_len, device, bottom_right=False)
        return window(pairs, None, 0), mask._bias
    if kind == "LowerTriangularFromBottomRightMask":
        return window(positions(q_len, k_len, device), None, 0), None
    if kind == "LowerTriangularFromBottomRightLocalAttentionMask":
        return window(positions(q_len, k_len, device), mask._window_size - 1, 0), None
    if kind == "LocalAttentionFromBottomRightMask":
        pairs = positions(q_len, k_len, device)
        return window(pairs, mask.window_left, mask.window_right), None
    if kind == "BlockDiagonalMask":
        return window(_blocks(mask, q_len, k_len, False), None, None), None
    if kind == "BlockDiagonalCausalMask":
        return window(_blocks(mask, q_len, k_len, False), None, 0), None
    if kind == "BlockDiagonalCausalFromBottomRightMask":
        return window(_blocks(mask, q_len, k_len, True), None, 0), None
    if kind == "BlockDiagonalCausalLocalAttentionMask":
        return window(_blocks(mask, q_len, k_len, False), mask._window_size - 1, 0), None
    if kind == "BlockDiagonalCausalLocalAttentionFromBottomRightMask":
        return window(_blocks(mask, q_len, k_len, True), mask._window_size - 1, 0), None
    graph_break(msg=f"memory_efficient_attention with {kind}: the package's own function runs")
    raise AssertionError("a graph break leaves this function")


def _blocks(mask: Any, q_len: int, k_len: int, bottom_right: bool) -> Pairs:
    """The documents of a block-diagonal mask, from its cumulative lengths."""
    of_q, of_k = mask.q_seqinfo, mask.k_seqinfo
    same = q_len == k_len and list(of_q.seqstart_py) == list(of_k.seqstart_py)
    return in_documents(
        of_q.seqstart, of_k.seqstart, q_len, k_len, same=same, bottom_right=bottom_right
    )


XFORMERS = {f.__name__: f for f in (memory_efficient_attention, memory_efficient_attention_forward)}
