"""More ways to spell attention, as models in the wild do; and more that only looks like it.

As in ``spellings_eager``: each takes weights and x [B, S, E].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

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
    scored,
    weighed,
)

Tensor = torch.Tensor


def masked_after_exp(s: Tensor) -> Tensor:
    e = (s - s.amax(-1, keepdim=True)).exp() * causal()
    return e / e.sum(-1, keepdim=True)


def zeroed_after_exp(s: Tensor) -> Tensor:
    e = (s - s.amax(-1, keepdim=True)).exp().masked_fill(~causal(), 0.0)
    return e / e.sum(-1, keepdim=True)


def masked_and_renormalised(s: Tensor) -> Tensor:
    p = s.softmax(-1) * causal()
    return p / p.sum(-1, keepdim=True)


def renormalised(s: Tensor) -> Tensor:
    p = F.dropout(s.softmax(-1), 0.0, training=True)
    return p / p.sum(-1, keepdim=True)


def three_operands(w: Weights, x: Tensor) -> Tensor:
    q, k, v = qkv(w, x)
    s = torch.einsum("bhqd,bhkd,h->bhqk", q, k, w.temperature.view(H))
    return w.o(merge(s.softmax(-1) @ v))


def three_operands_in_logarithms(w: Weights, x: Tensor) -> Tensor:
    q, k, v = qkv(w, x)
    s = torch.einsum("bhqd,bhkd,h->bhqk", q, k, w.temperature.view(H))
    return w.o(merge(s.log_softmax(-1).exp() @ v))


def projected_with_the_values(w: Weights, x: Tensor) -> Tensor:
    q, k, v = qkv(w, x)
    out = w.o.weight.view(E, H, D)
    return torch.einsum("bhqk,bhkd,ehd->bqe", (q @ k.mT).softmax(-1), v, out)


def transposed_keys(w: Weights, x: Tensor) -> Tensor:
    """Keys are projected as [B, E, S]."""
    q, v = heads(w.q(x)), heads(w.v(x))
    k = (w.k.weight @ x.transpose(1, 2) + w.k.bias[:, None]).view(B, H, D, S)
    return w.o(merge((q @ k * D**-0.5).softmax(-1) @ v))


def convolved_keys(w: Weights, x: Tensor) -> Tensor:
    """Projections as 1 x 1 convolutions over [B, E, S]."""
    q, k, v = (
        F.conv1d(x.transpose(1, 2), f.weight[:, :, None], f.bias).view(B, H, D, S)
        for f in (w.q, w.k, w.v)
    )
    p = torch.einsum("bhdq,bhdk->bhqk", q, k).softmax(-1)
    return w.o(torch.einsum("bhqk,bhdk->bhdq", p, v).reshape(B, E, S).transpose(1, 2))


def parts_joined(w: Weights, x: Tensor) -> Tensor:
    """A part of each head, and one that all heads share, as rotary keys in MLA."""
    q, k, v = qkv(w, x)
    shared = w.k_one(x)[:, None].expand(B, H, S, D)
    q, k = torch.cat([q, q * 0.5], -1), torch.cat([k, shared], -1)
    return w.o(merge((q @ k.mT * (2 * D) ** -0.5).softmax(-1) @ v))


def latent(w: Weights, x: Tensor) -> Tensor:
    """MLA as it decodes: queries taken to the latent, which is both key and value of all heads."""
    q = heads(w.q(x))
    up_k, up_v = w.k_two.weight.view(2, D, E)[0], w.v_one.weight
    low = x[..., : 2 * D]
    to_latent = w.k.weight.view(H, D, E)[..., : 2 * D]
    s = torch.einsum("bhqd,hdl->bhql", q, to_latent) @ low[:, None].mT
    s = s + heads(w.packed(x)[..., :E]) @ (x @ up_k.T)[:, None].mT
    out = s.mul(D**-0.5).softmax(-1) @ low[:, None]
    return torch.einsum("bhql,hdl->bqhd", out, to_latent).reshape(B, S, E) + (x @ up_v.T).sum()


def cosine(w: Weights, x: Tensor) -> Tensor:
    """Swin v2: normalised queries and keys, a learned scale that is clamped."""
    q, k, v = qkv(w, x)
    s = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    s = s * w.temperature.clamp(max=math.log(100.0)).exp()
    return w.o(merge(s.softmax(-1) @ v))


def normed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.layer_norm(q, (D,)), F.rms_norm(k, (D,))
    return (q @ k.mT).softmax(-1) @ v


def baddbmm(beta: float, alpha: float) -> Callable[..., Tensor]:
    def body(w: Weights, x: Tensor) -> Tensor:
        q, k, v = (t.reshape(B * H, S, D) for t in qkv(w, x))
        slopes = (2.0 ** -torch.arange(1, H + 1).to(x.dtype)).repeat(B)[:, None, None]
        bias = slopes * torch.arange(S)[None, None, :]
        v = v.view(B, H, S, D)
        s = torch.baddbmm(bias, q, k.transpose(1, 2), beta=beta, alpha=alpha)
        s = s.view(B, H, S, S).masked_fill(~causal(), MIN)
        out: Tensor = w.o(merge(s.softmax(-1) @ v))
        return out

    return body


def empty_baddbmm(w: Weights, x: Tensor) -> Tensor:
    """beta = 0 ignores what is added (GPT-NeoX, Megatron)."""
    q, k, v = (t.reshape(B * H, S, D) for t in qkv(w, x))
    nothing = torch.zeros(B * H, S, S, dtype=x.dtype)
    s = torch.baddbmm(nothing, q, k.transpose(1, 2), beta=0.0, alpha=D**-0.5)
    return w.o(merge((s.softmax(-1) @ v).view(B, H, S, D)))


def logits_in_float(w: Weights, x: Tensor) -> Tensor:
    q, k, v = qkv(w, x)
    s = torch.matmul(q, k.transpose(2, 3)) * D**-0.5 + torch.full((S, S), MIN).triu(1)
    p = F.softmax(s, dim=-1, dtype=torch.float32).to(v.dtype)
    return w.o(merge(torch.matmul(p, v)))


def divided_by_temperature(w: Weights, x: Tensor) -> Tensor:
    q, k, v = qkv(w, x)
    return w.o(merge((q @ k.mT / w.temperature).softmax(-1) @ v))


def scaled_by_position(w: Weights, x: Tensor) -> Tensor:
    """Scores grow with the logarithm of the query's position (InternLM, Qwen)."""
    q, k, v = qkv(w, x)
    grown = torch.arange(1, S + 1).to(x.dtype).log().add(1.0)[:, None]
    return w.o(merge((q @ k.mT * grown).softmax(-1) @ v))


def gathered_by_distance(w: Weights, x: Tensor) -> Tensor:
    """DeBERTa: queries with distances, and keys with distances, gathered along a table."""
    q, k, v = qkv(w, x)
    table = w.latents.expand(5, E).repeat(4, 1)[: 2 * S]
    distance = (torch.arange(S)[:, None] - torch.arange(S)[None, :] + S).clamp(0, 2 * S - 1)
    place = distance.expand(B, H, S, S)
    pos_k = heads(w.k(table)[None]).expand(B, H, 2 * S, D)
    pos_q = heads(w.q(table)[None]).expand(B, H, 2 * S, D)
    c2p = (q @ pos_k.mT).gather(-1, place)
    p2c = (k @ pos_q.mT).gather(-1, place).mT
    return w.o(merge(((q @ k.mT + c2p + p2c) * (3 * D) ** -0.5).softmax(-1) @ v))


def shifted_relative(w: Weights, x: Tensor) -> Tensor:
    """Transformer-XL: scores with positions, shifted so that each row reads its own distances."""
    q, k, v = qkv(w, x)
    r = heads(w.k(w.latents.repeat(2, 1)[:S][None])).expand(B, H, S, D)
    by_position = (q + w.temperature[None] * 0.1) @ r.mT
    padded = F.pad(by_position, (1, 0)).view(B, H, S + 1, S)
    shifted = padded[:, :, 1:].reshape(B, H, S, S)
    s = ((q + 0.1) @ k.mT + shifted) * D**-0.5
    return w.o(merge(s.masked_fill(~causal(), -math.inf).softmax(-1) @ v))


def heads_stacked(w: Weights, x: Tensor) -> Tensor:
    """One head after the other, their outputs joined."""
    parts = zip(*(f(x).chunk(H, -1) for f in (w.q, w.k, w.v)), strict=True)
    out = [(q @ k.transpose(1, 2) * D**-0.5).softmax(-1) @ v for q, k, v in parts]
    return w.o(torch.cat(out, -1))


def one_sequence(w: Weights, x: Tensor) -> Tensor:
    """No batch: [S, E], the keys as a linear layer's weight."""
    y = x[0]
    s = F.linear(w.q(y), w.k(y)) / math.sqrt(E)
    return w.o(s.softmax(-1) @ w.v(y))


def tensordotted(w: Weights, x: Tensor) -> Tensor:
    y = x[0]
    s = torch.tensordot(w.q(y), w.k(y), dims=([1], [1]))
    return w.o(torch.tensordot(s.softmax(-1), w.v(y), dims=1))


def inner(w: Weights, x: Tensor) -> Tensor:
    y = x[0]
    return w.o(torch.inner(w.q(y), w.k(y)).softmax(-1) @ w.v(y))


def grouped_weights(w: Weights, x: Tensor) -> Tensor:
    """Two key heads, the group beside the queries: [B, 2, 2 S, D]."""
    q = w.q(x).view(B, S, 2, 2, D).permute(0, 2, 3, 1, 4).reshape(B, 2, 2 * S, D)
    k, v = heads(w.k_two(x), 2), heads(w.v_two(x), 2)
    out = ((q @ k.mT).softmax(-1) @ v).view(B, 2, 2, S, D)
    return w.o(out.permute(0, 3, 1, 2, 4).reshape(B, S, E))


def selected_heads(w: Weights, x: Tensor) -> Tensor:
    chosen = torch.arange(H) // 2
    q, k, v = heads(w.q(x)), heads(w.k_two(x), 2), heads(w.v_two(x), 2)
    k, v = k.index_select(1, chosen), v[:, chosen]
    return w.o(merge((q @ k.mT).softmax(-1) @ v))


def off_by_one(s: Tensor) -> Tensor:
    """Softmax with one more logit of 0."""
    e = s.exp()
    return e / (1.0 + e.sum(-1, keepdim=True))


def gated_by_sink(w: Weights, x: Tensor) -> Tensor:
    q, k, v = qkv(w, x)
    s = q @ k.mT
    gate = torch.sigmoid(s.logsumexp(-1, keepdim=True) - w.sinks.view(1, H, 1, 1))
    return w.o(merge((s.softmax(-1) @ v) * gate))


def powers_of_two(s: Tensor) -> Tensor:
    e = torch.exp2((s - s.amax(-1, keepdim=True)) * math.log2(math.e))
    return e / e.sum(-1, keepdim=True)


def triangle(s: Tensor) -> Tensor:
    e = s.exp().tril()
    return e / e.sum(-1, keepdim=True)


def epsilon(s: Tensor) -> Tensor:
    e = s.exp()
    return e / (e.sum(-1, keepdim=True) + 1e-2)


def one_more(s: Tensor) -> Tensor:
    return s.exp() / (s.exp().sum(-1, keepdim=True) + 1.0)


def by_reciprocal(s: Tensor) -> Tensor:
    e = s.exp()
    return e * e.sum(-1).reciprocal().unsqueeze(-1)


def triangle_later(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = torch.where(causal(), (q @ k.mT * 0.3).exp(), 0.0)
    return (e @ v) / (e.sum(-1, keepdim=True) + 1e-3)


def lost(filled: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """Rows without a key are NaN until they become 0."""

    def body(w: Weights, x: Tensor, p: Tensor) -> Tensor:
        q, k, v = qkv(w, x)
        s = (q @ k.mT * D**-0.5).masked_fill(~(p[:, None, None] & causal()), -math.inf)
        return w.o(merge(filled(s.softmax(-1)) @ v))

    return body


def masked_by_products(w: Weights, x: Tensor) -> Tensor:
    """Tokens attend to those whose vectors point the same way."""
    q, k, v = qkv(w, x)
    alike = ((x @ x.mT) > 0)[:, None]
    return w.o(merge((q @ k.mT).masked_fill(~alike, -math.inf).softmax(-1) @ v))


def biased_by_products(w: Weights, x: Tensor) -> Tensor:
    q, k, v = qkv(w, x)
    return w.o(merge((q @ k.mT * 0.4 + (x @ x.mT)[:, None].tanh()).softmax(-1) @ v))


MORE: Mapping[str, Spelled] = {name: Spelled(body) for name, body in {
    "masked after exp": weighed(masked_after_exp),
    "zeroed after exp": weighed(zeroed_after_exp),
    "masked and renormalised": weighed(masked_and_renormalised),
    "renormalised": weighed(renormalised),
    "three operands, logarithms": three_operands_in_logarithms,
    "three operands": three_operands, "projected with the values": projected_with_the_values,
    "transposed keys": transposed_keys, "convolved keys": convolved_keys,
    "parts joined": parts_joined, "latent": latent, "cosine": cosine, "normed": formed(normed),
    "baddbmm, alpha": baddbmm(1.0, 0.3), "baddbmm, beta": baddbmm(0.5, 0.3),
    "baddbmm of nothing": empty_baddbmm, "logits in float": logits_in_float,
    "divided by a temperature": divided_by_temperature, "scaled by position": scaled_by_position,
    "gathered by distance": gathered_by_distance, 
    "shifted, relative": shifted_relative,
    "one sequence": one_sequence, "tensordot": tensordotted, "inner": inner,
    "group beside the queries": grouped_weights, "heads selected": selected_heads,
    "off by one": weighed(off_by_one),
    "softmin": weighed(lambda s: F.softmin(-s, dim=-1)),
    "special softmax": weighed(lambda s: torch.special.softmax(s, -1)),
    "special log softmax": weighed(lambda s: torch.special.log_softmax(s, -1).exp()),
    "powers of two": weighed(powers_of_two),
    "mean taken off keys": formed(
        lambda q, k, v: (q @ (k - k.mean(-2, keepdim=True)).mT).softmax(-1) @ v
    ),
    "a triangle of exp": weighed(triangle), "times the reciprocal": weighed(by_reciprocal),
    "a triangle, divided later": formed(triangle_later),
    "an epsilon in the sum": weighed(epsilon), "one in the sum": weighed(one_more),
}.items()} | {
    "heads one by one": Spelled(heads_stacked, H),
    "NaN chosen away": Spelled(lost(lambda p: torch.where(p.isnan(), 0.0, p)), inputs="xp"),
    "NaN chosen away by zeros": Spelled(
        lost(lambda p: torch.where(torch.isnan(p), torch.zeros_like(p), p)), inputs="xp"
    ),
    "NaN filled": Spelled(lost(lambda p: p.masked_fill(p.isnan(), 0.0)), inputs="xp"),
    "two numbers added": Spelled(
        scored(lambda w, s, p: s + (1 - p.to(s.dtype))[:, None, None] * -2e4
               + torch.where(causal(), 0.0, -2e4)), inputs="xp",
    ),
    "a mask given, and causal": Spelled(
        scored(lambda w, s, a: s + (torch.where(causal(), 0.0, -1e9) + a)), inputs="xa",
    ),
    "a mask given, causal by less": Spelled(
        scored(lambda w, s, a: s + torch.where(causal(), 0.0, -1e4) + a), inputs="xa",
    ),
    "a mask given where causal": Spelled(
        scored(lambda w, s, a: s + torch.where(causal(), a, -1e9)), inputs="xa",
    ),
    "filled, then a mask given": Spelled(
        scored(lambda w, s, a: (s + a).masked_fill(~causal(), -1e9)), inputs="xa",
    ),
    "filled, then padding as deep": Spelled(
        scored(lambda w, s, p: torch.where(causal(), s, -1e4)
               + (1 - p.to(s.dtype))[:, None, None] * -1e4), inputs="xp",
    ),
    "multiplied, then padding as deep": Spelled(
        scored(lambda w, s, p: s * causal().to(s.dtype) - 1e4 * (1 - causal().to(s.dtype))
               + (1 - p.to(s.dtype))[:, None, None] * -1e4), inputs="xp",
    ),
    "two lowest numbers, lifted": Spelled(
        scored(lambda w, s, p: torch.max(
            s + (torch.zeros_like(s).masked_fill(~causal(), MIN)
                 + torch.zeros_like(s).masked_fill(~p[:, None, None], MIN)),
            torch.full_like(s, MIN))), inputs="xp",
    ),
    "two lowest numbers, clamped": Spelled(
        scored(lambda w, s, p: (
            s + torch.zeros_like(s).masked_fill(~causal(), -math.inf)
            + torch.zeros_like(s).masked_fill(~p[:, None, None], MIN)
        ).clamp(min=MIN)), inputs="xp",
    ),
    "shaped and typed like scores": Spelled(
        scored(lambda w, s: s.flatten(1).reshape_as(s) + torch.arange(S).expand_as(s).type_as(s)),
    ),
    "a mask of products": Spelled(masked_by_products),
    "a bias of products": Spelled(biased_by_products),
}  # fmt: skip


def dual(s: Tensor) -> Tensor:
    return s.softmax(-1) * s.softmax(-2)


def sparsemax(s: Tensor) -> Tensor:
    z = s.sort(-1, descending=True).values
    bound = 1 + torch.arange(1, S + 1) * z > z.cumsum(-1)
    count = bound.sum(-1, keepdim=True)
    tau = (z.cumsum(-1).gather(-1, count - 1) - 1) / count
    return (s - tau).clamp(min=0)


def unequal(s: Tensor) -> Tensor:
    e = s.exp() * torch.arange(1, S + 1)
    return e / e.sum(-1, keepdim=True)


def stable_with_epsilon(s: Tensor) -> Tensor:
    e = (s - s.amax(-1, keepdim=True)).exp()
    return e / (e.sum(-1, keepdim=True) + 1e-2)


def written_over(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The keys of one end are written over, so that no function of positions says which."""
    s = q @ k.mT * 0.3
    s = s.slice_scatter(torch.full_like(s[..., 4:], -math.inf), -1, 4)
    return s.softmax(-1) @ v


def favor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = q.exp(), k.exp()
    return (q @ (k.mT @ v)) / (q @ k.sum(-2)[..., None])


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


def none_of(w: Weights, x: Tensor, attend: Callable[..., Tensor]) -> Tensor:
    q, k, v = qkv(w, x)
    return attend(q[:, :0], k[:, :0], v[:, :0])


MORE_DECOYS: Mapping[str, Callable[..., Any]] = {
    "no heads": lambda w, x: w.o(x) + none_of(w, x, F.scaled_dot_product_attention).sum(),
    "no heads, spelled": lambda w, x: w.o(x) + none_of(w, x, plain).sum(),
    "relu weights": weighed(lambda s: s.relu() / S),
    "squared relu": weighed(lambda s: s.relu() ** 2),
    "dual softmax": weighed(dual), "sparsemax": weighed(sparsemax),
    "kernel features": formed(favor), "written over": formed(written_over),
    "softplus weights": weighed(
        lambda s: F.softplus(s) / F.softplus(s).sum(-1, keepdim=True)
    ),
    "an epsilon beside a maximum": weighed(stable_with_epsilon),
    "exponentials weighed": weighed(unequal),
    "by deviation": weighed(lambda s: (s / s.std(-1, keepdim=True)).softmax(-1)),
    "renormalised over queries": weighed(
        lambda s: s.softmax(-1) / s.softmax(-1).sum(-2, keepdim=True)
    ),
    "gated by a sink": gated_by_sink,
    "addcmul": scored(
        lambda w, s: torch.addcmul(torch.full((S, S), -math.inf).triu(1), s, torch.ones(()))
    ),
    "lerp": scored(
        lambda w, s: torch.full_like(s, -1e9).lerp(s, causal().to(s.dtype))
    ),
    "masked_scatter": scored(
        lambda w, s: s.masked_scatter(~causal(), torch.full_like(s, -math.inf))
    ),
    "masked after, not renormalised": weighed(lambda s: s.softmax(-1) * causal()),
}  # fmt: skip
