"""Attention spelled out in many ways, and calculations that only look like it.

Each takes weights and x [B, S, E]; some also m [B, T, E], p bool [B, S] or f [B, S] of 0 and 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

Tensor = torch.Tensor
B, S, T, E, H, D = 2, 7, 9, 24, 4, 6
MIN = torch.finfo(torch.float32).min


class Weights(nn.Module):
    """Projections and whatever else a spelling needs."""

    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        self.body = body
        self.q, self.k, self.v, self.o = (nn.Linear(E, E) for _ in range(4))
        self.k_one, self.v_one = nn.Linear(E, D), nn.Linear(E, D)
        self.k_two, self.v_two = nn.Linear(E, 2 * D), nn.Linear(E, 2 * D)
        self.packed, self.router = nn.Linear(E, 3 * E), nn.Linear(E, S)
        self.query, self.latents = (
            nn.Parameter(torch.randn(1, 1, E)),
            nn.Parameter(torch.randn(5, E)),
        )
        self.table, self.sinks = nn.Parameter(torch.randn(2 * T, H)), nn.Parameter(torch.randn(H))
        self.mix = nn.Parameter(torch.randn(H, H))
        self.temperature = nn.Parameter(torch.rand(H, 1, 1) + 0.5)
        self.memory_k, self.memory_v = (nn.Parameter(torch.randn(11, E)) for _ in range(2))

    def forward(self, *args: Tensor) -> Any:
        return self.body(self, *args)


def heads(x: Tensor, n: int = H) -> Tensor:
    return x.view(x.shape[0], x.shape[1], n, -1).transpose(1, 2)


def merge(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def qkv(w: Weights, x: Tensor, m: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    m = x if m is None else m
    return heads(w.q(x)), heads(w.k(m)), heads(w.v(m))


def causal(n: int = S) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


def formed(form: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Attention on q, k, v of [B, H, S, D] in some form."""
    return lambda w, x: w.o(merge(form(*qkv(w, x))))


def weighed(weigh: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """Attention with its weights made of scaled scores in some way."""
    return formed(lambda q, k, v: weigh(q @ k.mT * D**-0.5) @ v)


def scored(change: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Attention whose scaled scores are changed in some way before a plain softmax."""

    def body(w: Weights, x: Tensor, *more: Tensor) -> Tensor:
        q, k, v = qkv(w, x)
        s = change(w, q @ k.transpose(-1, -2) / math.sqrt(D), *more)
        out: Tensor = w.o(merge(s.softmax(-1) @ v))
        return out

    return body


def heads_last(w: Weights, x: Tensor) -> Tensor:
    q, k, v = (f(x).view(B, S, H, D) for f in (w.q, w.k, w.v))
    p = torch.einsum("bqhd,bkhd->bqkh", q, k).div(math.sqrt(D)).softmax(2)
    return w.o(torch.einsum("bqkh,bkhd->bqhd", p, v).reshape(B, S, E))


def heads_inside(w: Weights, x: Tensor) -> Tensor:
    q, k, v = (f(x).unflatten(-1, (H, D)) for f in (w.q, w.k, w.v))
    p = torch.einsum("bihd,bjhd->bhij", q, k).softmax(-1)
    return w.o(torch.einsum("bhij,bjhd->bihd", p, v).flatten(2))


def dotted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum(
        "...qk,...kd->...qd", torch.einsum("...qd,...kd->...qk", q, k).softmax(-1), v
    )


def folded(w: Weights, x: Tensor) -> Tensor:
    q, k, v = (t.reshape(B * H, S, D) for t in qkv(w, x))
    return w.o(merge(torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v).view(B, H, S, D)))


def folded_baddbmm(w: Weights, x: Tensor) -> Tensor:
    q, k, v = (t.reshape(B * H, S, D) for t in qkv(w, x))
    bias = torch.zeros(S, S, dtype=x.dtype).masked_fill(~causal(), -math.inf)
    p = torch.baddbmm(bias, q, k.transpose(1, 2), beta=1.0, alpha=D**-0.5).softmax(-1)
    return w.o(merge(torch.bmm(p, v).view(B, H, S, D)))


def folded_unfolded(w: Weights, x: Tensor) -> Tensor:
    q, k, v = (t.reshape(B * H, S, D) for t in qkv(w, x))
    s = torch.bmm(q, k.transpose(1, 2)).view(B, H, S, S).masked_fill(~causal(), MIN)
    return w.o(merge((s.softmax(-1).view(B * H, S, S) @ v).view(B, H, S, D)))


def sequence_first(w: Weights, x: Tensor) -> Tensor:
    x = x.transpose(0, 1)
    q, k, v = (f(x).reshape(S, B * H, D).transpose(0, 1) for f in (w.q, w.k, w.v))
    p = ((q * D**-0.5) @ k.transpose(1, 2)).softmax(-1)
    return w.o((p @ v).transpose(0, 1).reshape(S, B, E)).transpose(0, 1)


def transposed_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (k @ q.mT * 0.3).softmax(-2).mT @ v


def transposed_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = torch.einsum("bhkd,bhqd->bhkq", k, q).softmax(2)
    return torch.einsum("bhkq,bhkd->bhdq", p, v).transpose(-1, -2)


def multiplied_and_summed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1)
    return (s.softmax(-1).unsqueeze(-1) * v.unsqueeze(-3)).sum(-2)


def repeated(repeat: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """Two heads of K and V for four of Q."""

    def body(w: Weights, x: Tensor) -> Tensor:
        q, k, v = heads(w.q(x)), heads(w.k_two(x), 2), heads(w.v_two(x), 2)
        out: Tensor = w.o(merge((q @ repeat(k).mT).softmax(-1) @ repeat(v)))
        return out

    return body


def grouped_five(w: Weights, x: Tensor) -> Tensor:
    q = w.q(x).view(B, S, 2, 2, D).permute(0, 2, 3, 1, 4)
    k, v = heads(w.k_two(x), 2).unsqueeze(2), heads(w.v_two(x), 2).unsqueeze(2)
    return w.o(((q @ k.mT).softmax(-1) @ v).permute(0, 3, 1, 2, 4).reshape(B, S, E))


def grouped_einsum(w: Weights, x: Tensor) -> Tensor:
    q, k, v = w.q(x).view(B, S, 2, 2, D), w.k_two(x).view(B, S, 2, D), w.v_two(x).view(B, S, 2, D)
    p = torch.einsum("bqgrd,bkgd->bgrqk", q, k).softmax(-1)
    return w.o(torch.einsum("bgrqk,bkgd->bqgrd", p, v).reshape(B, S, E))


def multi_query(w: Weights, x: Tensor) -> Tensor:
    p = torch.einsum("bqhd,bkd->bhqk", w.q(x).view(B, S, H, D), w.k_one(x)).softmax(-1)
    return w.o(torch.einsum("bhqk,bkd->bqhd", p, w.v_one(x)).reshape(B, S, E))


def multi_query_matmul(w: Weights, x: Tensor) -> Tensor:
    k, v = w.k_one(x).unsqueeze(1), w.v_one(x).unsqueeze(1)
    return w.o(merge((heads(w.q(x)) @ k.mT).softmax(-1) @ v))


def packed_chunks(w: Weights, x: Tensor) -> Tensor:
    q, k, v = (heads(t) for t in w.packed(x).chunk(3, -1))
    return w.o(merge((q @ k.mT).softmax(-1) @ v))


def packed_unbound(w: Weights, x: Tensor) -> Tensor:
    q, k, v = w.packed(x).view(B, S, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
    return w.o(merge((q @ k.transpose(-2, -1)).softmax(-1) @ v))


def one_head(w: Weights, x: Tensor) -> Tensor:
    return w.o((w.q(x) @ w.k(x).transpose(1, 2) / E**0.5).softmax(-1) @ w.v(x))


def one_head_einsum(w: Weights, x: Tensor) -> Tensor:
    p = torch.einsum("bid,bjd->bij", w.q(x), w.k(x)).softmax(dim=2)
    return w.o(torch.einsum("bij,bjd->bid", p, w.v(x)))


def across(w: Weights, x: Tensor, m: Tensor) -> Tensor:
    q, k, v = qkv(w, x, m)
    return w.o(merge((q @ k.mT).softmax(-1) @ v))


def no_projections(w: Weights, x: Tensor) -> Tensor:
    return (x @ x.transpose(1, 2) / E**0.5).softmax(-1) @ x


def no_projections_einsum(w: Weights, x: Tensor) -> Tensor:
    return torch.einsum("bij,bjd->bid", torch.einsum("bid,bjd->bij", x, x).softmax(-1), x)


def two_products(w: Weights, x: Tensor) -> Tensor:
    q, k, v = qkv(w, x)
    s = q[..., :4] @ k[..., :4].mT + q[..., 4:] @ w.k_one(x)[:, None, :, 4:].mT
    return w.o(merge((s * D**-0.5).softmax(-1) @ v))


def other_value_dim(w: Weights, x: Tensor) -> Tensor:
    q, k, v = heads(w.q(x), 2), heads(w.k(x), 2), heads(w.v_two(x), 2)
    return (q @ k.mT).softmax(-1) @ v


def differential(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    first = (q[..., :3] @ k[..., :3].mT).softmax(-1) @ v
    return first - 0.5 * ((q[..., 3:] @ k[..., 3:].mT).softmax(-1) @ v)


def by_sum(s: Tensor) -> Tensor:
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True)


def by_max(s: Tensor) -> Tensor:
    e = torch.exp(s - s.max(dim=-1, keepdim=True).values.detach())
    return e / e.sum(dim=-1).unsqueeze(-1)


def divided_later(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = (q @ k.mT * 0.3).exp()
    return (e @ v) / e.sum(-1, keepdim=True)


def upcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (q @ k.mT).float().softmax(-1, dtype=torch.float32).to(q.dtype)
    return F.dropout(s, 0.1, training=False) @ v


def with_sink(w: Weights, x: Tensor) -> Tensor:
    q, k, v = qkv(w, x)
    s = torch.cat([q @ k.mT, w.sinks.view(1, H, 1, 1).expand(B, H, S, 1)], -1)
    return w.o(merge((s - s.amax(-1, keepdim=True)).softmax(-1)[..., :-1] @ v))


def sink_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.cat([q.new_zeros(B, H, S, 1), q @ k.mT], -1)
    return s.softmax(-1)[..., 1:] @ v


def relative(w: Weights, s: Tensor) -> Tensor:
    distance = torch.arange(S)[None, :] - torch.arange(S)[:, None]
    return s + F.embedding(distance + T, w.table).permute(2, 0, 1)


def alibi(w: Weights, s: Tensor) -> Tensor:
    slopes = 2.0 ** -(torch.arange(H) + 1.0)
    return s + slopes[:, None, None] * (torch.arange(S)[None, :] - torch.arange(S)[:, None])


@dataclass(frozen=True, eq=False)
class Spelled:
    body: Callable[..., Any]
    sites: int = 1
    inputs: str = "x"


SPELLINGS: Mapping[str, Spelled] = {name: Spelled(body) for name, body in {
    "heads last": heads_last, "heads inside": heads_inside, "dots": formed(dotted),
    "folded": folded, "baddbmm": folded_baddbmm, "folded and unfolded": folded_unfolded,
    "sequence first": sequence_first, "transposed scores": formed(transposed_scores),
    "all transposed": formed(transposed_all), "by mul and sum": formed(multiplied_and_summed),
    "grouped by expand": repeated(lambda k: k[:, :, None].expand(B, 2, 2, S, D).flatten(1, 2)),
    "grouped by repeat_interleave": repeated(lambda k: k.repeat_interleave(2, dim=1)),
    "grouped by repeat": repeated(lambda k: k.repeat(1, 2, 1, 1)),
    "both ways": formed(lambda q, k, v: (q @ k.mT + (q @ k.mT).mT).softmax(-1) @ v),
    "grouped in five dimensions": grouped_five, "grouped by einsum": grouped_einsum,
    "multi-query by einsum": multi_query, "multi-query by matmul": multi_query_matmul,
    "packed, chunks": packed_chunks, "packed, unbound": packed_unbound, "one head": one_head,
    "one head by einsum": one_head_einsum, "without projections": no_projections,
    "without projections by einsum": no_projections_einsum, "two products": two_products,
    "another value dim": other_value_dim, "exp over sum": weighed(by_sum),
    "exp minus max": weighed(by_max), "divided after the values": formed(divided_later),
    "upcast and dropout": formed(upcast), "a sink": with_sink, "a zero first": formed(sink_first),
    "F.softmax": weighed(lambda s: F.softmax(s, dim=-1)),
    "nn.Softmax": weighed(lambda s: nn.Softmax(dim=3)(s)),
    "logsumexp": weighed(lambda s: (s - s.logsumexp(-1, keepdim=True)).exp()),
    "log_softmax": weighed(lambda s: s.log_softmax(-1).exp()),
    "safe softmax": weighed(lambda s: torch.ops.aten._safe_softmax(s, -1)),
    "nan_to_num": weighed(lambda s: s.masked_fill(~causal(), -math.inf).softmax(-1).nan_to_num()),
    "shifted by the mean": weighed(lambda s: (s - s.mean(-1, keepdim=True)).softmax(-1)),
    "plain": scored(lambda w, s: s), "scaled twice": scored(lambda w, s: s * 0.5 / 0.3),
    "negated twice": scored(lambda w, s: (-s).neg()),
    "a temperature": scored(lambda w, s: s * w.temperature),
    "soft cap": scored(lambda w, s: 20 * torch.tanh(s / 20)),
    "soft cap, mask": scored(
        lambda w, s: (torch.tanh(s / 5) * 5).masked_fill(~causal(), -math.inf)
    ),
    "causal": scored(lambda w, s: s.masked_fill(~causal(), -math.inf)),
    "causal, lowest": scored(lambda w, s: s.masked_fill(~causal(), MIN)),
    "causal, where": scored(lambda w, s: torch.where(causal(), s, -1e9)),
    "causal, where not": scored(lambda w, s: torch.where(~causal(), -math.inf, s)),
    "causal, added": scored(lambda w, s: s + torch.full((S, S), -math.inf).triu(1)),
    "causal, a product": scored(lambda w, s: s + (1.0 - causal().float()) * -1e9),
    "causal, lerp": scored(lambda w, s: s * causal().float() - 1e4 * (1 - causal().float())),
    "causal, clamped": scored(lambda w, s: s.masked_fill(~causal(), -math.inf).clamp(min=MIN)),
    "window": scored(lambda w, s: s.masked_fill(~causal().triu(-2), -math.inf)),
    "ALiBi": scored(alibi),
    "ALiBi, causal": scored(lambda w, s: alibi(w, s).masked_fill(~causal(), -math.inf)),
    "learned relative bias": scored(relative),
    "learned bias by head": scored(lambda w, s: s + w.table[:S].T[:, None, :]),
}.items()} | {
    "across": Spelled(across, inputs="xm"),
    "differential": Spelled(formed(differential), 2),
    "padding": Spelled(
        scored(lambda w, s, p: s.masked_fill(~p[:, None, None], -math.inf)), inputs="xp"
    ),
    "padding, lowest": Spelled(
        scored(lambda w, s, p: s.masked_fill(~p[:, None, None], MIN)), inputs="xp"
    ),
    "padding, numbers": Spelled(
        scored(lambda w, s, f: s + (1.0 - f[:, None, None]) * MIN), inputs="xf"
    ),
    "padding, rows lost": Spelled(
        scored(lambda w, s, p: s.masked_fill(~(p[:, None, None] & causal()), MIN)), inputs="xp"
    ),
    "padding, rows lost, added": Spelled(
        scored(lambda w, s, p: s + torch.where(p[:, None, None] & causal(), 0.0, MIN)),
        inputs="xp",
    ),
    "padding, rows lost, NaN": Spelled(
        scored(lambda w, s, p: s.masked_fill(~causal(), -math.inf).masked_fill(~p[:, None, None],
                                                                       -math.inf)),
        inputs="xp",
    ),
}  # fmt: skip


def pooled(w: Weights, x: Tensor) -> Tensor:
    return torch.einsum("bs,bsd->bd", (x @ w.query.squeeze(0).T).squeeze(-1).softmax(-1), x)


def pooled_by_token(w: Weights, x: Tensor) -> Tensor:
    return (w.query.expand(B, 1, E) @ w.k(x).mT).softmax(-1) @ w.v(x)


def slots(w: Weights, x: Tensor) -> Tensor:
    p = (w.q(w.latents).expand(B, 5, E) @ w.k(x).mT).softmax(1)
    return (p / p.sum(-1, keepdim=True)) @ w.v(x)


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


def soft_experts(w: Weights, x: Tensor) -> Tensor:
    experts = torch.stack([x * i for i in range(S)], 2)
    return torch.einsum("bse,bsed->bsd", w.router(x).softmax(-1), experts)


def router(w: Weights, x: Tensor) -> Tensor:
    weights, chosen = w.router(x).softmax(-1).topk(2)
    return x * weights.sum(-1, keepdim=True) + chosen.sum(-1, keepdim=True)


def memory(w: Weights, x: Tensor) -> Tensor:
    return (w.q(x) @ w.memory_k.T).softmax(-1) @ w.memory_v


def projected_memory(w: Weights, x: Tensor) -> Tensor:
    p = torch.einsum("bse,me->bsm", x, w.k(w.memory_k)).softmax(-1)
    return torch.einsum("bsm,me->bse", p, w.memory_v)


def mixed_before(w: Weights, x: Tensor) -> Tensor:
    q, k, v = qkv(w, x)
    return w.o(merge(torch.einsum("bhqk,hg->bgqk", q @ k.mT, w.mix).softmax(-1) @ v))


def mixed_after(w: Weights, x: Tensor) -> Tensor:
    q, k, v = qkv(w, x)
    return w.o(merge(torch.einsum("bhqk,hg->bgqk", (q @ k.mT).softmax(-1), w.mix) @ v))


def used_again(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = (q @ k.mT).softmax(-1)
    return p @ v + p.mean()


def returned(w: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = qkv(w, x)
    p = (q @ k.mT).softmax(-1)
    return w.o(merge(p @ v)), p


def scores_used_again(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    return s.softmax(-1) @ v + s.square().mean()


def scores_returned(w: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = qkv(w, x)
    s = q @ k.mT * 0.3
    return w.o(merge(s.softmax(-1) @ v)), s


def contrastive(w: Weights, x: Tensor) -> Tensor:
    return (w.q(x).mean(1) @ w.k(x).mean(1).T).log_softmax(-1)


def top_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    return s.masked_fill(s < s.topk(3, -1).values[..., -1:], -math.inf).softmax(-1) @ v


def windows(w: Weights, x: Tensor) -> Tensor:
    x = torch.cat([x, x[:, :1]], 1)  # 8 tokens, windows of 4
    q, k, v = (f(x).view(B * 2, 4, E) for f in (w.q, w.k, w.v))
    return w.o(((q @ k.mT).softmax(-1) @ v).view(B, 8, E))


def convolved(w: Weights, x: Tensor) -> Tensor:
    q, k, v = qkv(w, x)
    return w.o(merge(F.conv2d(q @ k.mT, w.mix[:, :, None, None]).softmax(-1) @ v))


DECOYS: Mapping[str, Callable[..., Any]] = {
    "a learned query pools": pooled, "a learned token pools": pooled_by_token, "slots": slots,
    "linear attention": formed(linear_attention), "soft experts": soft_experts, "router": router,
    "memory": memory, "projected memory": projected_memory, "heads mixed before": mixed_before,
    "heads mixed after": mixed_after, "weights used again": formed(used_again),
    "weights returned": returned, "scores used again": formed(scores_used_again),
    "scores returned": scores_returned,
    "over heads": formed(lambda q, k, v: (q @ k.mT).softmax(1) @ v),
    "over batch": formed(lambda q, k, v: (q @ k.mT).softmax(0) @ v),
    "over queries": formed(lambda q, k, v: (q @ k.mT).softmax(-2) @ v),
    "symmetric, one product": weighed(lambda s: (s + s.mT).softmax(-1)),
    "sigmoid": weighed(torch.sigmoid),
    "squared weights": weighed(lambda s: s.softmax(-1).square()),
    "detached": weighed(lambda s: s.detach().softmax(-1)), "contrastive": contrastive,
    "top keys": formed(top_keys), "windows": windows, "convolved": convolved,
    "not normalised": weighed(torch.exp), "rolled": weighed(lambda s: s.roll(1, -1).softmax(-1)),
}  # fmt: skip
