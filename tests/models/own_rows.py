"""Models that add to their scores what each query makes of itself: a row for each query."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["HIDDEN", "TERMS", "Rows"]

Tensor = torch.Tensor
HIDDEN, HEADS, MOST = 16, 2, 64


class Rows(nn.Module):
    """Two layers of attention, spelled out, with a further term in its scores."""

    def __init__(self, term: str, causal: bool = False) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.term, self.causal = term, causal
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.positions = nn.Linear(HIDDEN, HIDDEN)
        self.table = nn.Parameter(torch.randn(8, HIDDEN))
        self.content, self.place = (nn.Parameter(torch.randn(HEADS, 1, 8)) for _ in range(2))
        self.by_key = nn.Linear(HIDDEN, HEADS * MOST)
        self.first = nn.Parameter(torch.randn(1, 1, HIDDEN))
        self.out = nn.Linear(HIDDEN, HIDDEN)
        nn.init.normal_(self.qkv.weight, std=0.4)

    def attend(self, x: Tensor) -> Tensor:
        batch, seq_len, _ = x.shape
        q, k, v = self.qkv(x).view(batch, seq_len, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        scores = (q + self.content) @ k.transpose(-1, -2) + TERMS[self.term](self, x, q)
        scores = scores / 8**0.5
        if self.causal:
            later = torch.ones(seq_len, seq_len, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, float("-inf"))
        mixed = scores.softmax(-1) @ v
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, seq_len, HIDDEN))
        return x + out

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(self.attend(x)).tanh()


Term = Callable[[Rows, Tensor, Tensor], Tensor]


def sinusoids(positions: Tensor, like: Tensor) -> Tensor:
    rates = torch.exp(torch.arange(HIDDEN // 2, dtype=like.dtype) * -0.5)
    angles = positions.to(like.dtype)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], -1)


def by_distance(m: Rows, q: Tensor, positions: Tensor) -> Tensor:
    """[batch, heads, queries, positions]."""
    keys: Tensor = m.positions(sinusoids(positions, q)).view(-1, HEADS, 8)
    return (q + m.place) @ keys.permute(1, 2, 0)


def transformer_xl(m: Rows, x: Tensor, q: Tensor) -> Tensor:
    """Row i moved by i: reshaped one column too short."""
    n = x.shape[1]
    rows = by_distance(m, q, torch.arange(n, -n, -1))
    batch, heads, queries, columns = rows.shape
    rows = rows.reshape(batch, heads, columns, queries)[:, :, 1:, :]
    rows = rows.reshape(batch, heads, queries, columns - 1)
    return torch.index_select(rows, 3, torch.arange(n))


def padded(m: Rows, x: Tensor, q: Tensor) -> Tensor:
    """The same with a column of zeros in front, as conformers write it."""
    n = x.shape[1]
    rows = by_distance(m, q, torch.arange(n - 1, -n, -1))
    zeros = torch.zeros((*rows.shape[:3], 1), dtype=rows.dtype)
    moved = torch.cat([zeros, rows], -1).view(*rows.shape[:2], rows.shape[3] + 1, rows.shape[2])
    return moved[:, :, 1:].view_as(rows)[..., :n]


def earlier(m: Rows, x: Tensor, q: Tensor) -> Tensor:
    """As Transformer-XL first wrote it: what is right of the diagonal is the next query's."""
    n = x.shape[1]
    rows = by_distance(m, q, torch.arange(n - 1, -1, -1))
    zeros = torch.zeros((*rows.shape[:3], 1), dtype=rows.dtype)
    moved = torch.cat([zeros, rows], -1).view(*rows.shape[:2], n + 1, n)
    return moved[:, :, 1:].view_as(rows)


def gathered(m: Rows, x: Tensor, q: Tensor) -> Tensor:
    """Each query's products with a short table of distances, looked up by distance."""
    n = x.shape[1]
    rows = q @ m.table[:, :8].T
    distance = (torch.arange(n)[None] - torch.arange(n)[:, None]).clamp(-3, 4) + 3
    return rows.gather(-1, distance.expand(*q.shape[:2], n, n))


def synthesized(m: Rows, x: Tensor, q: Tensor) -> Tensor:
    """Scores that a layer makes of the query alone."""
    batch, n, _ = x.shape
    scores: Tensor = m.by_key(x).view(batch, n, HEADS, MOST).transpose(1, 2)[..., :n]
    return scores.tanh()


def behind_a_token(m: Rows, x: Tensor, q: Tensor) -> Tensor:
    """A row of zeros in front of what the other tokens make."""
    made = transformer_xl(m, x[:, 1:], q[:, :, 1:])
    return F.pad(made, (1, 0, 1, 0))


TERMS: Mapping[str, Term] = {
    "transformer-xl": transformer_xl,
    "padded": padded,
    "earlier keys": earlier,
    "gathered": gathered,
    "synthesized": synthesized,
    "behind a token": behind_a_token,
}


def inputs(seq_len: int) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seq_len)
    return (torch.randn(2, seq_len, HIDDEN, generator=generator),)
