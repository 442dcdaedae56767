"""Softmaxes that are combined before they meet the values, as in differential attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.nn import functional as F

from tests.passes.detect.spellings_eager import (
    MIN,
    B,
    D,
    E,
    H,
    S,
    Spelled,
    Weights,
    causal,
    formed,
    heads,
    merge,
    qkv,
    weighed,
)

Tensor = torch.Tensor


def halves(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps [B, H, S, S] of the halves of each head."""
    s = (q[..., :3] @ k[..., :3].mT, q[..., 3:] @ k[..., 3:].mT)
    a, b = ((x * 0.5).masked_fill(~causal(), MIN).softmax(-1) for x in s)
    return a, b


def subtracted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a, b = halves(q, k)
    return (a - 0.5 * b) @ v


def subtracted_with_alpha(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a, b = halves(q, k)
    return torch.sub(a, b, alpha=0.5).to(v.dtype) @ v


def learned(w: Weights, x: Tensor) -> Tensor:
    """How much of the second map is taken is learned, for each head."""
    q, k, v = qkv(w, x)
    a, b = halves(q, k)
    return w.o(merge(F.dropout(a - w.temperature.exp() * b, 0.1, training=False) @ v))


def by_einsum(w: Weights, x: Tensor) -> Tensor:
    q, k, v = qkv(w, x)
    a, b = halves(q, k)
    mixed = torch.einsum("bhqk,bhkd->bqhd", a - w.temperature * b, v)
    return w.o(mixed.reshape(B, S, E))


def values_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a, b = halves(q, k)
    return (v.mT @ (0.25 * a + b / 3).mT).mT


def maps(w: Weights, x: Tensor) -> Tensor:
    """[B, H, S, S] of H heads, all of them."""
    q, k, _ = qkv(w, x)
    return (q @ k.mT).masked_fill(~causal(), MIN).softmax(-1)


def selected(w: Weights, x: Tensor) -> Tensor:
    """As differential transformers are written: two maps for each pair of heads."""
    p = maps(w, x).view(B, H // 2, 2, S, S)
    p = p[:, :, 0] - w.temperature[0] * p[:, :, 1]
    return w.o(F.rms_norm(p @ heads(w.v(x), 2), (2 * D,)).transpose(1, 2).reshape(B, S, E))


def chunked(w: Weights, x: Tensor) -> Tensor:
    a, b = maps(w, x).chunk(2, dim=1)
    return w.o(merge((a - 0.3 * b) @ heads(w.v(x), 2)))


def unbound(w: Weights, x: Tensor) -> Tensor:
    a, b = maps(w, x).unflatten(1, (2, -1)).unbind(1)
    return w.o(merge((a - 0.3 * b).type_as(x) @ heads(w.v(x), 2)))


def every_second(w: Weights, x: Tensor) -> Tensor:
    p = maps(w, x)
    return w.o(merge((p[:, ::2] - 0.3 * p[:, 1::2]) @ heads(w.v(x), 2)))


def selected_by_einsum(w: Weights, x: Tensor) -> Tensor:
    p = maps(w, x).view(B, 2, 2, S, S)
    mixed = torch.einsum("bhqk,bkhd->bqhd", p[:, :, 0] - 0.3 * p[:, :, 1], w.v(x).view(B, S, 2, -1))
    return w.o(mixed.reshape(B, S, E))


def of_one_value_head(w: Weights, x: Tensor) -> Tensor:
    a, b = maps(w, x).chunk(2, dim=1)
    mixed = (a - 0.3 * b) @ w.v_one(x)[:, None]
    return mixed.transpose(1, 2).reshape(B, S, -1)


def each_head_gated(w: Weights, x: Tensor) -> Tensor:
    q, k, v = qkv(w, x)
    return w.o(merge(((q @ k.mT).softmax(-1) * w.temperature) @ v))


def each_query_gated(w: Weights, x: Tensor) -> Tensor:
    q, k, v = qkv(w, x)
    gate = heads(x).mean(-1, keepdim=True).sigmoid()
    return w.o(torch.einsum("bhqk,bhkd->bqhd", gate * (q @ k.mT).softmax(-1), v).flatten(2))


COMBINED: Mapping[str, Spelled] = {
    "weights subtracted": Spelled(formed(subtracted), 2),
    "weights subtracted, alpha, cast": Spelled(formed(subtracted_with_alpha), 2),
    "weights subtracted, learned": Spelled(learned, 2),
    "weights subtracted, einsum": Spelled(by_einsum, 2),
    "weights added, values first": Spelled(formed(values_first), 2),
    "differential, selected": Spelled(selected), "differential, chunked": Spelled(chunked),
    "differential, unbound": Spelled(unbound), "differential, slices": Spelled(every_second),
    "differential, einsum": Spelled(selected_by_einsum),
    "differential, one value head": Spelled(of_one_value_head),
    "each head gated": Spelled(each_head_gated), "each query gated": Spelled(each_query_gated),
    "weights scaled": Spelled(weighed(lambda s: s.softmax(-1) * 0.5 / 3)),
}  # fmt: skip


def keys_gated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT).softmax(-1) * k.mean(-1)[:, :, None]) @ v


def with_identity(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT).softmax(-1) + torch.eye(S)) @ v


def mixed_by_shape(w: Weights, x: Tensor) -> Tensor:
    """What is subtracted has one map for all heads."""
    q, k, v = qkv(w, x)
    p = (q @ k.mT).softmax(-1)
    return w.o(merge((p - p.mean(1, keepdim=True)) @ v))


COMBINED_DECOYS: Mapping[str, Callable[..., Tensor]] = {
    "keys gated": formed(keys_gated), "an identity added": formed(with_identity),
    "the mean of all heads subtracted": mixed_by_shape,
}  # fmt: skip
