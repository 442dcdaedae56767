"""Attention whose weights are dropped at random, in many spellings, and what only looks like it.

As in ``spellings_eager``: each takes weights and x [B, S, E]. A quarter of the weights is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tests.passes.detect.spellings_eager import (
    B,
    D,
    H,
    S,
    Weights,
    causal,
    formed,
    heads,
    merge,
    qkv,
    weighed,
)

Tensor = torch.Tensor
P = 0.25


def after_softmax(drop: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return weighed(lambda s: drop(s.softmax(-1)))


def in_place(p: Tensor) -> Tensor:
    return F.dropout(p, P, training=True, inplace=True)


def uniform_in_place(p: Tensor) -> Tensor:
    return p * (torch.empty_like(p).uniform_() >= P) / (1 - P)


def bernoulli_in_place(p: Tensor) -> Tensor:
    return p * torch.empty_like(p).bernoulli_(1 - P).div_(1 - P)


def bernoulli_of_a_chance(p: Tensor) -> Tensor:
    return p * torch.bernoulli(torch.full_like(p, 1 - P)) / (1 - P)


def floored(p: Tensor) -> Tensor:
    """As timm's drop_path writes its draw."""
    return p * (torch.rand(p.shape, dtype=p.dtype) + (1 - P)).floor_() / (1 - P)


def by_a_shape(p: Tensor) -> Tensor:
    return p * (torch.rand(B, H, S, S, dtype=p.dtype) > P).to(p.dtype) / (1 - P)


def filled(p: Tensor) -> Tensor:
    return p.masked_fill(torch.rand_like(p) < P, 0.0) / (1 - P)


def chosen(p: Tensor) -> Tensor:
    return torch.where(torch.rand_like(p) < P, torch.zeros_like(p), p) * (1 / (1 - P))


def chosen_by_number(p: Tensor) -> Tensor:
    return torch.where(~(torch.rand_like(p) < P), p, 0.0).mul(1 / (1 - P))


def exponentials(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Divided after the product, by the sum of what was not dropped."""
    e = (q @ k.mT * D**-0.5).exp()
    return (F.dropout(e, P) @ v) / e.sum(-1, keepdim=True)


def masked(w: Weights, x: Tensor) -> Tensor:
    q, k, v = qkv(w, x)
    s = (q @ k.mT / math.sqrt(D)).masked_fill(~causal(), -math.inf)
    return w.o(merge(nn.Dropout(P)(s.softmax(-1)) @ v))


def grouped(w: Weights, x: Tensor) -> Tensor:
    """Two heads of keys for four of queries, a float mask, weights in another order of axes."""
    q = heads(w.q(x))
    k, v = (heads(f(x), 2).repeat_interleave(2, 1) for f in (w.k_two, w.v_two))
    s = torch.einsum("bhqd,bhkd->bqhk", q, k) / math.sqrt(D)
    bias = torch.zeros(S, S, dtype=x.dtype).masked_fill(~causal(), -math.inf)
    p = F.dropout((s + bias[:, None]).softmax(-1), P)
    return w.o(torch.einsum("bqhk,bhkd->bqhd", p, v).flatten(2))


def with_sink(w: Weights, x: Tensor) -> Tensor:
    """Dropped with the sink beside the keys, which is cut off after it."""
    q, k, v = qkv(w, x)
    s = torch.cat([q @ k.mT / math.sqrt(D), w.sinks.view(1, H, 1, 1).expand(B, H, S, 1)], -1)
    return w.o(merge(F.dropout(s.softmax(-1), P)[..., :-1] @ v))


def with_bias(w: Weights, x: Tensor) -> Tensor:
    q, k, v = qkv(w, x)
    where = torch.arange(S)[None] - torch.arange(S)[:, None] + S
    s = q @ k.mT / math.sqrt(D) + w.table[where].permute(2, 0, 1)
    return w.o(merge(F.dropout(s.softmax(-1), P) @ v))


def by_kernel(w: Weights, x: Tensor) -> Tensor:
    return w.o(merge(F.scaled_dot_product_attention(*qkv(w, x), dropout_p=P, is_causal=True)))


def by_kernel_with_mask(w: Weights, x: Tensor) -> Tensor:
    q = heads(w.q(x))
    k, v = (heads(f(x), 2) for f in (w.k_two, w.v_two))
    out = F.scaled_dot_product_attention(q, k, v, causal(), dropout_p=P, enable_gqa=True)
    return w.o(merge(out))


def one_map(w: Weights, x: Tensor) -> Tensor:
    """One map of weights for the values of all heads, which are one head's then."""
    q, k = w.k_one(x), w.v_one(x)
    p = F.dropout((q @ k.mT).softmax(-1), P)
    return w.o(merge(p[:, None] @ heads(w.v(x))))


DROPPING: Mapping[str, Callable[..., Tensor]] = {
    "a function": after_softmax(lambda p: F.dropout(p, P)),
    "a module": after_softmax(nn.Dropout(P)),
    "in place": after_softmax(in_place),
    "twice": after_softmax(lambda p: F.dropout(F.dropout(p, 0.1), 1 - (1 - P) / 0.9)),
    "one of two off": after_softmax(lambda p: F.dropout(F.dropout(p, 0.5, False), P)),
    "cast": after_softmax(lambda p: F.dropout(p.float(), P).to(p.dtype)),
    "native": after_softmax(lambda p: torch.native_dropout(p, P, True)[0]),
    "uniform in place": after_softmax(uniform_in_place),
    "bernoulli in place": after_softmax(bernoulli_in_place),
    "bernoulli of a chance": after_softmax(bernoulli_of_a_chance),
    "bernoulli of a number": after_softmax(lambda p: p * torch.bernoulli(p, 1 - P) / (1 - P)),
    "floored": after_softmax(floored),
    "by a shape": after_softmax(by_a_shape),
    "filled": after_softmax(filled),
    "chosen": after_softmax(chosen),
    "chosen by number": after_softmax(chosen_by_number),
    "exponentials": formed(exponentials),
    "masked": masked,
    "one map for all heads": one_map,
    "grouped": grouped,
    "a sink": with_sink,
    "a trained bias": with_bias,
    "a kernel": by_kernel,
    "a kernel, masked": by_kernel_with_mask,
}


def on_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout(q @ k.mT, P).softmax(-1) @ v


def some_rows(p: Tensor) -> Tensor:
    return torch.cat([F.dropout(p[:, :, :3], P), p[:, :, 3:]], 2)


def a_number_a_key(p: Tensor) -> Tensor:
    return p * (torch.rand(B, 1, 1, S, dtype=p.dtype) > P) / (1 - P)


def drawn_once(w: Weights, x: Tensor) -> Tensor:
    """Two attentions drop the same weights."""
    q, k, v = qkv(w, x)
    kept = (torch.rand(B, H, S, S, dtype=x.dtype) > P) / (1 - P)
    first = ((q @ k.mT).softmax(-1) * kept) @ v
    return w.o(merge(((k @ q.mT).softmax(-1) * kept) @ first))


DROPPING_DECOYS: Mapping[str, tuple[Callable[..., Any], str]] = {
    "on scores": (formed(on_scores), "between its product and its softmax stands dropout"),
    "all": (after_softmax(lambda p: F.dropout(p, 1.0)), "its dropout drops all of its weights"),
    "not scaled": (
        after_softmax(lambda p: p * (torch.rand_like(p) > P)),
        "kept with a chance of 0.75 and multiplied by 1",
    ),
    "a number a key": (after_softmax(a_number_a_key), "one random number for several"),
    "whole channels": (after_softmax(lambda p: F.dropout2d(p, P)), "other users (mul, new_empty)"),
    "some rows": (after_softmax(some_rows), "other users (slice)"),
    "drawn once": (drawn_once, "what its weights are dropped by has other users"),
    "returned": (
        lambda w, x: _weights_too(*qkv(w, x)), "its attention weights are also an output"
    ),
}  # fmt: skip
"""Each with its reason."""


def _weights_too(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    p = F.dropout((q @ k.mT).softmax(-1), P)
    return p @ v, p
