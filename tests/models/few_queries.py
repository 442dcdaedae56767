"""Models in which few queries attend to many keys, after attention over all tokens or alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["MANY", "POOLS", "Pooling"]

Tensor = torch.Tensor
HIDDEN, HEADS, LATENTS = 16, 2, 3


class Pooling(nn.Module):
    """A projection of [B, S, HIDDEN], a body that pools it, by name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = {**POOLS, **MANY}[name]
        self.inp, self.out = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.q, self.kv = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, 2 * HIDDEN)
        self.latents = nn.Parameter(torch.randn(LATENTS, HIDDEN))
        self.score, self.scores = nn.Linear(HIDDEN, 1), nn.Linear(HIDDEN, 3)
        self.bias = nn.Parameter(torch.randn(HEADS, LATENTS, 64))
        self.mha = nn.MultiheadAttention(HIDDEN, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.body(self, self.inp(x))
        return found

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, -1)).transpose(-2, -3)

    def attend(self, x: Tensor, causal: bool = False) -> Tensor:
        q, k, v = map(self.heads, self.qkv(x).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return x + mixed.transpose(1, 2).flatten(2)

    def cross(self, queries: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
        k, v = map(self.heads, self.kv(x).chunk(2, -1))
        mixed = F.scaled_dot_product_attention(self.heads(self.q(queries)), k, v, mask)
        found: Tensor = queries + self.out(mixed.transpose(1, 2).flatten(2))
        return found

    def learned(self, x: Tensor, count: int = LATENTS) -> Tensor:
        return self.latents[:count].expand(x.shape[0], -1, -1)


Body = Callable[[Pooling, Tensor], Tensor]


def map_head(m: Pooling, x: Tensor) -> Tensor:
    """Multi-head attention pooling: one learned query."""
    x = m.attend(x)
    return m.cross(m.learned(x, 1), x)[:, 0]


def after_causal(m: Pooling, x: Tensor) -> Tensor:
    x = m.attend(x, causal=True)
    return m.cross(m.learned(x), x)


def latents(m: Pooling, x: Tensor) -> Tensor:
    """A perceiver: latents attend to all tokens, to each other, to all tokens."""
    inner = m.attend(m.cross(m.learned(x), x))
    return m.cross(inner, x)


def class_attention(m: Pooling, x: Tensor) -> Tensor:
    """Two layers in which only the class token attends, to itself and all others."""
    x, token = m.attend(x), m.learned(x, 1)
    for _ in range(2):
        token = m.cross(token, torch.cat([token, x], 1))
    return token


def class_token_of_a_sequence(m: Pooling, x: Tensor) -> Tensor:
    x = m.attend(torch.cat([m.learned(x, 1), x], 1))
    return m.cross(x[:, :1], x)


def registers(m: Pooling, x: Tensor) -> Tensor:
    """The first tokens attend to all, and are put back."""
    x = m.attend(torch.cat([m.learned(x), x], 1))
    return torch.cat([m.cross(x[:, :LATENTS], x), x[:, LATENTS:]], 1)


def last_tokens(m: Pooling, x: Tensor) -> Tensor:
    x = m.attend(x)
    return m.cross(x[:, -2:], x)


def objects(m: Pooling, x: Tensor) -> Tensor:
    """A detector's decoder: object queries attend to each other, then to the memory."""
    memory = m.attend(x)
    queries = m.learned(x)
    for _ in range(2):
        queries = m.cross(m.attend(queries), memory)
    return queries


def resampler(m: Pooling, x: Tensor) -> Tensor:
    """Queries attend to the tokens and to themselves, in one sequence of keys."""
    x, queries = m.attend(x), m.learned(x)
    return m.cross(queries, torch.cat([x, queries], 1))


def inducing_points(m: Pooling, x: Tensor) -> Tensor:
    """A set transformer: points attend to the set, the set attends to the points."""
    return m.cross(x, m.cross(m.learned(x), x))


def landmarks(m: Pooling, x: Tensor) -> Tensor:
    """Nystrom: two of three kernels are of means of the tokens."""
    q, k, v = map(m.heads, m.qkv(x).chunk(3, -1))
    few_q, few_k = (y.unflatten(2, (2, -1)).mean(3) for y in (q[:, :, :12], k[:, :, :12]))
    there = (q @ few_k.mT / 3).softmax(-1)
    inner = (few_q @ few_k.mT / 3).softmax(-1)
    back = (few_q @ k.mT / 3).softmax(-1) @ v
    return (there @ (inner @ back)).transpose(1, 2).flatten(2)


def landmarks_of_segments(m: Pooling, x: Tensor) -> Tensor:
    """Nystrom: all tokens are in a segment, and the kernel of landmarks is inverted in steps."""
    length = x.shape[1]
    x = F.pad(x, (0, 0, length % 2, 0))
    q, k, v = map(m.heads, m.qkv(x).chunk(3, -1))
    few_q, few_k = (y.unflatten(2, (2, -1)).mean(3) for y in (q, k))
    there = (q @ few_k.mT / 3).softmax(-1)
    inner = (few_q @ few_k.mT / 3).softmax(-1)
    inverse = inner.mT / (inner.abs().sum(-2).max() * inner.abs().sum(-1).max())
    for _ in range(2):
        inverse = inverse @ (2 * torch.eye(2, dtype=x.dtype) - inner @ inverse)
    back = (few_q @ k.mT / 3).softmax(-1) @ v
    return (there @ inverse @ back).transpose(1, 2).flatten(2)[:, -length:]


def key_padding(m: Pooling, x: Tensor) -> Tensor:
    keep = torch.arange(x.shape[1]) < torch.tensor([[5], [11]])
    return m.cross(m.learned(x), m.attend(x), keep[:, None, None])


def hidden_rows(m: Pooling, x: Tensor) -> Tensor:
    """All keys of one batch entry are hidden by the lowest number: the mean of all values."""
    keep = torch.arange(x.shape[1]) < torch.tensor([[5], [0]])
    k, v = map(m.heads, m.kv(m.attend(x)).chunk(2, -1))
    scores = m.heads(m.q(m.latents)) @ k.mT
    return scores.masked_fill(~keep[:, None, None], torch.finfo(x.dtype).min).softmax(-1) @ v


def bias_over_keys(m: Pooling, x: Tensor) -> Tensor:
    return m.cross(m.learned(x), m.attend(x), m.bias[..., : x.shape[1]])


def grouped_heads(m: Pooling, x: Tensor) -> Tensor:
    x = m.attend(x)
    k, v = (y[:, None, :, :8] for y in m.kv(x).chunk(2, -1))
    q = m.heads(m.q(m.learned(x, 1)))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def in_plain_operators(m: Pooling, x: Tensor) -> Tensor:
    x = m.attend(x)
    k, v = map(m.heads, m.kv(x).chunk(2, -1))
    weights = (m.heads(m.q(m.latents)) @ k.mT / math.sqrt(8)).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def by_einsum(m: Pooling, x: Tensor) -> Tensor:
    x = m.attend(x)
    k, v = m.kv(x).chunk(2, -1)
    scores = torch.einsum("qd,bsd->bqs", m.latents, k)
    scores = (scores - scores.amax(-1, keepdim=True)).exp()
    return torch.einsum("bqs,bsd->bqd", scores / scores.sum(-1, keepdim=True), v)


def of_torch(m: Pooling, x: Tensor) -> Tensor:
    x = m.attend(x)
    padding = torch.arange(x.shape[1]) >= torch.tensor([[5], [11]])
    found: Tensor = m.mha(m.learned(x), x, x, key_padding_mask=padding, need_weights=False)[0]
    return found


def one_query_without_an_axis(m: Pooling, x: Tensor) -> Tensor:
    x = m.attend(x)
    k, v = map(m.heads, m.kv(x).chunk(2, -1))
    weights = torch.einsum("hd,bhsd->bhs", m.latents[0].view(HEADS, -1), k).softmax(-1)
    return torch.einsum("bhs,bhsd->bhd", weights, v)


def one_score_a_token(m: Pooling, x: Tensor) -> Tensor:
    x = m.attend(x)
    return (m.score(x).softmax(1) * x).sum(1)


def scores_of_heads(m: Pooling, x: Tensor) -> Tensor:
    x = m.attend(x)
    return torch.einsum("bsh,bsd->bhd", m.scores(x).softmax(1), x)


def masked_score(m: Pooling, x: Tensor) -> Tensor:
    x = m.attend(x)
    keep = torch.arange(x.shape[1]) < torch.tensor([[5], [11]])
    weights = m.score(x).squeeze(-1).masked_fill(~keep, -math.inf).softmax(-1)
    return (weights[:, None] @ x).squeeze(1)


def slots(m: Pooling, x: Tensor) -> Tensor:
    """Slot attention: softmax over the slots, then a weighted mean over the tokens."""
    x = m.attend(x)
    k, v = m.kv(x).chunk(2, -1)
    weights = torch.einsum("qd,bsd->bqs", m.latents, k).softmax(1) + 1e-8
    weights = weights / weights.sum(-1, keepdim=True)
    return torch.einsum("bqs,bsd->bqd", weights, v)


POOLS: Mapping[str, Body] = {
    f.__name__: f
    for f in (
        map_head, after_causal, latents, class_attention, class_token_of_a_sequence, registers,
        last_tokens, objects, resampler, inducing_points, landmarks, landmarks_of_segments,
        key_padding, hidden_rows, bias_over_keys, grouped_heads, in_plain_operators, by_einsum,
        of_torch, one_query_without_an_axis, one_score_a_token, scores_of_heads, masked_score,
        slots,
    )
}  # fmt: skip
"""No key, value or hidden state is gathered in any of them."""


def many_queries(m: Pooling, x: Tensor) -> Tensor:
    """The reverse: tokens attend to few keys, which move."""
    return m.cross(x, m.learned(x))


def half_as_many(m: Pooling, x: Tensor) -> Tensor:
    x = m.attend(x)
    return m.cross(x[:, ::2], x)


def alike(m: Pooling, x: Tensor) -> Tensor:
    return m.attend(m.attend(x, causal=True))


MANY: Mapping[str, Body] = {f.__name__: f for f in (many_queries, half_as_many, alike)}
"""Attention whose keys are not many more than its queries."""
