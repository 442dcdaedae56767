"""Maps of scores that read whole rows, spelled out; and some that read columns too.

Each takes the model's parts and q, k, v [B, H, S, D], and gives what the values are weighed to, or
that and further results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["COLUMNS", "HIDDEN", "ROWS", "Across", "Patches", "RowMap"]

Tensor = torch.Tensor
HIDDEN, HEADS, LONGEST = 16, 2, 48


class RowMap(nn.Module):
    """A projection, perhaps attention, then a map of rows by name, twice if it is a stack."""

    def __init__(self, name: str, before: str = "") -> None:
        super().__init__()
        torch.manual_seed(3)
        self.weigh, self.before = {**ROWS, **COLUMNS}[name], before
        self.inp, self.out = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.first, self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, 3 * HIDDEN)
        self.mixed = nn.Parameter(torch.randn(2, HEADS, HEADS))
        self.places = nn.Parameter(torch.randn(LONGEST, HIDDEN // HEADS))
        self.bias = nn.Parameter(torch.randn(HEADS, LONGEST, LONGEST))
        self.pair, self.gate = nn.Linear(HIDDEN // HEADS, 1), nn.Parameter(torch.randn(HEADS, 1, 1))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        x = self.inp(x)
        if self.before:
            q, k, v = self.heads(self.first(x))
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.before == "causal")
            x = x + self.joined(mixed)
        found = self.weigh(self, *self.heads(self.qkv(x)))
        mixed, *further = found if isinstance(found, tuple) else (found,)
        result = x + self.out(self.joined(mixed))
        return (result, *further) if further else result

    def heads(self, x: Tensor) -> list[Tensor]:
        return [y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in x.chunk(3, -1)]

    def joined(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)


class Across(RowMap):
    """Cross attention: rows of another sequence than keys and values."""

    def forward(self, x: Tensor, memory: Tensor) -> Tensor | tuple[Tensor, ...]:  # type: ignore[override]
        if self.before:
            q, k, v = self.heads(self.first(memory))
            memory = memory + self.joined(F.scaled_dot_product_attention(q, k, v))
        (q, _, _), (_, k, v) = self.heads(self.qkv(self.inp(x))), self.heads(self.qkv(memory))
        found = self.weigh(self, q, k, v)
        mixed, *further = found if isinstance(found, tuple) else (found,)
        result = x + self.out(self.joined(mixed))
        return (result, *further) if further else result


class Patches(RowMap):
    """Tokens are the patches of an image, row by row."""

    def __init__(self, name: str, before: str = "") -> None:
        super().__init__(name, before)
        self.cut = nn.Conv2d(3, HIDDEN, 4, stride=4)

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, ...]:
        return super().forward(self.cut(image).flatten(2).transpose(1, 2))


Found = Tensor | tuple[Tensor, ...]
Weigh = Callable[[RowMap, Tensor, Tensor, Tensor], Found]


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT / math.sqrt(q.shape[-1])


def below(s: Tensor, ahead: int = 0) -> Tensor:
    return torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).tril(ahead)


def distance(s: Tensor) -> Tensor:
    n = s.shape[-1]
    return (torch.arange(n)[:, None] - torch.arange(n)).to(s.dtype)


# --- which keys of a row count


def top_k(m: RowMap, q: Tensor, k: Tensor, v: Tensor) -> Found:
    s = scores(q, k)
    least = s.topk(4, -1).values[..., -1:]
    return s.masked_fill(s < least, -math.inf).softmax(-1) @ v


def top_k_scattered(m: RowMap, q: Tensor, k: Tensor, v: Tensor) -> Found:
    s = scores(q, k)
    values, at = s.topk(5, -1)
    return torch.zeros_like(s).scatter(-1, at, values.softmax(-1)) @ v


def top_p(m: RowMap, q: Tensor, k: Tensor, v: Tensor) -> Found:
    w = scores(q, k).softmax(-1)
    p, at = w.sort(-1, descending=True)
    kept = p.cumsum(-1) - p < 0.8
    w = w * torch.zeros_like(kept).scatter(-1, at, kept)
    return (w / w.sum(-1, keepdim=True)) @ v


def above_the_mean(m: RowMap, q: Tensor, k: Tensor, v: Tensor) -> Found:
    s = scores(q, k)
    return s.masked_fill(s < s.mean(-1, keepdim=True), -math.inf).softmax(-1) @ v


def kth_value(m: RowMap, q: Tensor, k: Tensor, v: Tensor) -> Found:
    s = scores(q, k).masked_fill(~below(scores(q, k)), -1e9)
    return s.masked_fill(s < s.kthvalue(5, -1, keepdim=True).values, -1e9).softmax(-1) @ v


def hard(m: RowMap, q: Tensor, k: Tensor, v: Tensor) -> Found:
    """The largest weight of each row, with the gradient of all."""
    w = scores(q, k).softmax(-1)
    one = torch.zeros_like(w).scatter(-1, w.argmax(-1, keepdim=True), 1.0)
    return (one - w.detach() + w) @ v


def masked_after(m: RowMap, q: Tensor, k: Tensor, v: Tensor) -> Found:
    s = scores(q, k)
    return s.softmax(-1).masked_fill(~below(s), 0) @ v


def scaled_after(m: RowMap, q: Tensor, k: Tensor, v: Tensor) -> Found:
    """By distance, with a bias of pairs that is trained, and weighed anew."""
    s = scores(q, k)
    n = s.shape[-1]
    w = (s + m.bias[:, :n, :n]).softmax(-1) * torch.exp(-0.1 * distance(s).abs())
    return (w / (w.sum(-1, keepdim=True) + 0.1)) @ v


# --- other maps than a softmax


def sparsemax(m: RowMap, q: Tensor, k: Tensor, v: Tensor) -> Found:
    s = scores(q, k)
    z = s.sort(-1, descending=True).values
    n = torch.arange(1, s.shape[-1] + 1, dtype=s.dtype)
    total = z.cumsum(-1) - 1
    size = (n * z > total).sum(-1, keepdim=True)
    return (s - total.gather(-1, size - 1) / size).clamp(min=0) @ v


def entmax(m: RowMap, q: Tensor, k: Tensor, v: Tensor) -> Found:
    """Of power 1.5."""
    s = scores(q, k) / 2
    s = s - s.amax(-1, keepdim=True)
    z, _ = s.sort(-1, descending=True)
    n = torch.arange(1, s.shape[-1] + 1, dtype=s.dtype)
    mean, square = z.cumsum(-1) / n, z.square().cumsum(-1) / n
    least = mean - ((1 - n * (square - mean**2)) / n).clamp(min=1e-9).sqrt()
    size = (least <= z).sum(-1, keepdim=True)
    return (s - least.gather(-1, size - 1)).clamp(min=0) ** 2 @ v


def entmax_by_bisection(m: RowMap, q: Tensor, k: Tensor, v: Tensor) -> Found:
    s = scores(q, k)
    low = s.amax(-1, keepdim=True) - 1
    step = 1 - 1 / s.shape[-1]
    for _ in range(6):
        step = step / 2
        is_less = (s - low - step).clamp(min=0).sum(-1, keepdim=True) >= 1
        low = torch.where(is_less, low + step, low)
    w = (s - low).clamp(min=0)
    return (w / w.sum(-1, keepdim=True)) @ v


def sigmoid(m: RowMap, q: Tensor, k: Tensor, v: Tensor) -> Found:
    s = scores(q, k)
    return torch.sigmoid(s - math.log(s.shape[-1])).masked_fill(~below(s), 0) @ v


def stick_breaking(m: RowMap, q: Tensor, k: Tensor, v: Tensor) -> Found:
    s = scores(q, k)
    seen = below(s, -1)
    left = F.logsigmoid(-s).masked_fill(~seen, 0)
    left = left.flip(-1).cumsum(-1).flip(-1) - left
    return (F.logsigmoid(s) + left).masked_fill(~seen, -math.inf).exp() @ v


def one_more(m: RowMap, q: Tensor, k: Tensor, v: Tensor) -> Found:
    """1 beside the sum of exponentials."""
    s = scores(q, k)
    most = s.amax(-1, keepdim=True).clamp(min=0)
    e = (s - most).exp()
    return e / (e.sum(-1, keepdim=True) + (-most).exp()) @ v


def one_more_padded(m: RowMap, q: Tensor, k: Tensor, v: Tensor) -> Found:
    return F.pad(scores(q, k), (1, 0)).softmax(-1)[..., 1:] @ v


def one_more_joined(m: RowMap, q: Tensor, k: Tensor, v: Tensor) -> Found:
    s = scores(q, k)
    return torch.cat([s, torch.zeros_like(s[..., :1])], -1).softmax(-1)[..., :-1] @ v


def squared_relu(m: RowMap, q: Tensor, k: Tensor, v: Tensor) -> Found:
    return (F.relu(scores(q, k)) ** 2 / q.shape[-2]) @ v


def normalized(m: RowMap, q: Tensor, k: Tensor, v: Tensor) -> Found:
    return F.normalize(scores(q, k), dim=-1) @ v


def retention(m: RowMap, q: Tensor, k: Tensor, v: Tensor) -> Found:
    s = scores(q, k)
    far = distance(s)
    s = s * torch.where(far >= 0, m.gate.sigmoid() ** far.clamp(min=0), 0)
    return (s / s.detach().abs().sum(-1, keepdim=True).clamp(min=1)) @ v


def convit(m: RowMap, q: Tensor, k: Tensor, v: Tensor) -> Found:
    """A gate between the weights of contents and those of positions."""
    s, share = scores(q, k), m.gate.sigmoid()
    w = (1 - share) * s.softmax(-1) + share * (-distance(s).square() * m.gate**2).softmax(-1)
    return (w / w.sum(-1, keepdim=True)) @ v


# --- over heads, over positions, and used by others too


def talking_heads(m: RowMap, q: Tensor, k: Tensor, v: Tensor) -> Found:
    s = torch.einsum("bhqk,hg->bgqk", scores(q, k), m.mixed[0])
    return torch.einsum("bgqk,gh->bhqk", s.softmax(-1), m.mixed[1]) @ v


def talking_heads_last(m: RowMap, q: Tensor, k: Tensor, v: Tensor) -> Found:
    s = F.linear(torch.einsum("bhqd,bhkd->bqkh", q, k), m.mixed[0])
    return torch.einsum("bqkh,bhkd->bhqd", F.linear(s.softmax(2), m.mixed[1]), v)


def contextual_positions(m: RowMap, q: Tensor, k: Tensor, v: Tensor) -> Found:
    s = scores(q, k).masked_fill(~below(scores(q, k)), -1e9)
    at = s.sigmoid().flip(-1).cumsum(-1).flip(-1).clamp(max=LONGEST - 1)
    by_place = q @ m.places.T
    near, far = by_place.gather(-1, at.floor().long()), by_place.gather(-1, at.ceil().long())
    share = at - at.floor()
    return (s + far * share + near * (1 - share)).softmax(-1) @ v


def weights_returned(m: RowMap, q: Tensor, k: Tensor, v: Tensor) -> Found:
    w = scores(q, k).softmax(-1)
    return w @ v, w


def weights_with_a_loss(m: RowMap, q: Tensor, k: Tensor, v: Tensor) -> Found:
    w = scores(q, k).softmax(-1)
    return w @ v, -(w * (w + 1e-6).log()).sum(-1).mean()


def two_sets_of_values(m: RowMap, q: Tensor, k: Tensor, v: Tensor) -> Found:
    w = scores(q, k).sigmoid()
    return w @ v + (w / w.sum(-1, keepdim=True)) @ k.tanh()


def keys_first(m: RowMap, q: Tensor, k: Tensor, v: Tensor) -> Found:
    """Each column of k q^T is what a query weighs."""
    s = scores(k, q)
    w = s.masked_fill(s < s.topk(4, -2).values[..., -1:, :], -math.inf).softmax(-2)
    return torch.einsum("bhkq,bhkd->bhqd", w, v)


def in_one_batch(m: RowMap, q: Tensor, k: Tensor, v: Tensor) -> Found:
    a, b, c = (x.flatten(0, 1) for x in (q, k, v))
    w = torch.bmm(a, b.transpose(1, 2)).view(*q.shape[:-1], -1).sigmoid()
    return torch.bmm(w.view(len(a), *w.shape[2:]), c).view_as(v)


def additive(m: RowMap, q: Tensor, k: Tensor, v: Tensor) -> Found:
    s = m.pair((q[..., :, None, :] + k[..., None, :, :]).tanh()).squeeze(-1)
    return s.masked_fill(s < s.median(-1, keepdim=True).values, -math.inf).softmax(-1) @ v


def distances(m: RowMap, q: Tensor, k: Tensor, v: Tensor) -> Found:
    w = 1 / (1 + torch.cdist(q, k))
    return (w / w.sum(-1, keepdim=True)) @ v


def in_blocks_of_keys(m: RowMap, q: Tensor, k: Tensor, v: Tensor) -> Found:
    """A softmax by a running maximum and sum, over blocks of keys."""
    most = q.new_full((*q.shape[:-1], 1), -1e30)
    total, found = torch.zeros_like(most), torch.zeros_like(q)
    for start in range(0, k.shape[-2], 5):
        s = scores(q, k[..., start : start + 5, :])
        now = torch.maximum(most, s.amax(-1, keepdim=True))
        e, before = (s - now).exp(), (most - now).exp()
        total = total * before + e.sum(-1, keepdim=True)
        found = found * before + e @ v[..., start : start + 5, :]
        most = now
    return found / total


ROWS: Mapping[str, Weigh] = {
    f.__name__: f
    for f in (
        top_k, top_k_scattered, top_p, above_the_mean, kth_value, hard, masked_after, scaled_after,
        sparsemax, entmax, entmax_by_bisection, sigmoid, stick_breaking, one_more, one_more_padded,
        one_more_joined, squared_relu, normalized, retention, convit, talking_heads,
        talking_heads_last, contextual_positions, weights_returned, weights_with_a_loss,
        two_sets_of_values, keys_first, in_one_batch, additive, distances, in_blocks_of_keys,
    )
}  # fmt: skip


# --- what reads columns as well


def dual_softmax(m: RowMap, q: Tensor, k: Tensor, v: Tensor) -> Found:
    s = scores(q, k)
    return (s.softmax(-1) * s.softmax(-2)) @ v


def sinkhorn(m: RowMap, q: Tensor, k: Tensor, v: Tensor) -> Found:
    s = scores(q, k)
    for _ in range(3):
        s = s - s.logsumexp(-1, keepdim=True)
        s = s - s.logsumexp(-2, keepdim=True)
    return s.exp() @ v


def selective(m: RowMap, q: Tensor, k: Tensor, v: Tensor) -> Found:
    """What one head does not want to see any more, summed over the queries before."""
    s = scores(q, k).masked_fill(~below(scores(q, k)), -math.inf)
    unwanted = torch.where(below(s, -1), F.relu(s[:, :1]), 0)
    return (s - unwanted.cumsum(-2) + unwanted).softmax(-1) @ v


def as_keys_see_it(m: RowMap, q: Tensor, k: Tensor, v: Tensor) -> Found:
    """Values go from queries to keys as well."""
    w = scores(q, k).sigmoid()
    return w @ v + w.mT @ v.tanh()


def attention_received(m: RowMap, q: Tensor, k: Tensor, v: Tensor) -> Found:
    """Each token counts by the weight that all queries give it."""
    w = scores(q, k).softmax(-1)
    return (w @ v) * w.sum(-2)[..., None], w.amax(-2)


def symmetric(m: RowMap, q: Tensor, k: Tensor, v: Tensor) -> Found:
    s = scores(q, k)
    return (s + s.mT).softmax(-1) @ v


def two_steps(m: RowMap, q: Tensor, k: Tensor, v: Tensor) -> Found:
    """Weights of weights."""
    w = scores(q, k).softmax(-1)
    return w @ w @ v


COLUMNS: Mapping[str, Weigh] = {
    f.__name__: f
    for f in (
        dual_softmax, sinkhorn, selective, as_keys_see_it, attention_received, symmetric, two_steps,
    )
}  # fmt: skip
