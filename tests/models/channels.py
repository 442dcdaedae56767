"""Attention of channels (cross-covariance), in many spellings; and attention that resembles it.

``OVER_TOKENS`` take [B, N, C], ``OVER_IMAGES`` [B, C, H, W]; ``DECOYS`` attend over tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["DECOYS", "HIDDEN", "OVER_IMAGES", "OVER_TOKENS", "Channels", "Decoy", "Images"]

Tensor = torch.Tensor
HIDDEN, HEADS, LONGEST = 12, 2, 40
DIM = HIDDEN // HEADS


class Channels(nn.Module):
    """A projection, then channel attention by name, several times if it is deep."""

    def __init__(self, name: str, depth: int = 1) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.mix, self.depth = OVER_TOKENS[name], depth
        self.inp, self.out = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.qkv, self.norm = nn.Linear(HIDDEN, 3 * HIDDEN), nn.LayerNorm(HIDDEN)
        self.q, self.kv = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, 2 * DIM)
        self.temperature = nn.Parameter(torch.rand(HEADS, 1, 1) + 0.5)
        self.bias = nn.Parameter(torch.randn(HEADS, DIM, DIM))
        self.places = nn.Parameter(torch.randn(LONGEST, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x) + self.places[: x.shape[1]]
        for _ in range(self.depth):
            x = x + self.out(self.mix(self, self.norm(x)).tanh())
        return x

    def rows(self, x: Tensor) -> tuple[Tensor, ...]:
        """q, k, v [B, H, N, d]."""
        return self.qkv(x).unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4).unbind(0)

    def columns(self, x: Tensor) -> tuple[Tensor, ...]:
        """q, k, v [B, H, d, N]."""
        batch, length, _ = x.shape
        parts = self.qkv(x).reshape(batch, length, 3, HEADS, DIM)
        return parts.permute(2, 0, 3, 4, 1).unbind(0)


def joined(x: Tensor) -> Tensor:
    """[B, H, d, N] -> [B, N, C]."""
    return x.permute(0, 3, 1, 2).flatten(2)


def normed(m: Channels, x: Tensor) -> Tensor:
    q, k, v = m.columns(x)
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    weights = ((q @ k.transpose(-2, -1)) * m.temperature).softmax(-1)
    return joined(weights @ v)


def chunked_einsum(m: Channels, x: Tensor) -> Tensor:
    q, k, v = (t.unflatten(-1, (HEADS, DIM)).permute(0, 2, 3, 1) for t in m.qkv(x).chunk(3, -1))
    q, k = (F.normalize(t, dim=-1, p=2) for t in (q, k))
    scores = torch.einsum("b h i n, b h j n -> b h i j", q, k) * m.temperature.exp()
    return joined(torch.einsum("b h i j, b h j n -> b h i n", scores.softmax(-1), v))


def keys_with_values(m: Channels, x: Tensor) -> Tensor:
    """Queries are what is weighed."""
    q, k, v = m.rows(x)
    weights = ((k * DIM**-0.5).transpose(-1, -2) @ v).softmax(dim=-1)
    y = (weights @ q.transpose(-1, -2)).transpose(-1, -2)
    return y.transpose(1, 2).flatten(2)


def called(m: Channels, x: Tensor) -> Tensor:
    """Scaled by the number of tokens, which a call takes for its head dim."""
    q, k, v = (t.transpose(-2, -1) for t in m.rows(x))
    return joined(F.scaled_dot_product_attention(q, k, v))


def called_with_scale(m: Channels, x: Tensor) -> Tensor:
    q, k, v = m.columns(x)
    q, k = F.normalize(q, dim=-1) * m.temperature, F.normalize(k, dim=-1)
    return joined(F.scaled_dot_product_attention(q, k, v, scale=1.0))


def called_with_bias(m: Channels, x: Tensor) -> Tensor:
    q, k, v = m.columns(x)
    return joined(F.scaled_dot_product_attention(q, k, v, attn_mask=m.bias, scale=0.1))


def called_causal(m: Channels, x: Tensor) -> Tensor:
    q, k, v = m.columns(x)
    return joined(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.1))


def called_in_groups(m: Channels, x: Tensor) -> Tensor:
    """One head of keys and values for all queries."""
    q = m.q(x).unflatten(-1, (HEADS, DIM)).permute(0, 2, 3, 1)
    k, v = (t.transpose(1, 2).unsqueeze(1) for t in m.kv(x).chunk(2, -1))
    return joined(F.scaled_dot_product_attention(q, k, v, scale=0.1, enable_gqa=True))


def called_without_heads(m: Channels, x: Tensor) -> Tensor:
    q, k, v = (t.mT for t in m.qkv(x).chunk(3, -1))
    return F.scaled_dot_product_attention(q, k, v, scale=0.1).mT


def batched(m: Channels, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).split(HIDDEN, -1)
    weights = torch.bmm(q.transpose(1, 2), k).div(x.shape[1]).softmax(-1)
    return torch.bmm(weights, v.transpose(1, 2)).transpose(1, 2)


def other_side(m: Channels, x: Tensor) -> Tensor:
    """Each token is multiplied with weights on its right."""
    q, k, v = m.rows(x)
    weights = (q.transpose(-2, -1) @ k * 0.1).softmax(-2)
    return (v @ weights).transpose(1, 2).flatten(2)


def exponentials(m: Channels, x: Tensor) -> Tensor:
    q, k, v = m.columns(x)
    scores = (q @ k.mT * 0.05).exp()
    return joined(scores / scores.sum(-1, keepdim=True) @ v)


def own_norm(m: Channels, x: Tensor) -> Tensor:
    q, k, v = m.columns(x)
    q, k = (t / t.pow(2).sum(-1, keepdim=True).add(1e-6).sqrt() for t in (q, k))
    return joined((q @ k.mT * m.temperature).softmax(-1) @ v)


def covariance(m: Channels, x: Tensor) -> Tensor:
    """Of values about their mean over the tokens."""
    q, k, v = m.columns(x)
    q, k = (t - t.mean(-1, keepdim=True) for t in (q, k))
    return joined((q @ k.mT / (x.shape[1] - 1)).softmax(-1) @ v)


def correlation(m: Channels, x: Tensor) -> Tensor:
    q, k, v = m.columns(x)
    q, k = ((t - t.mean(-1, keepdim=True)) / (t.std(-1, keepdim=True) + 0.1) for t in (q, k))
    return joined((q @ k.mT / x.shape[1]).softmax(-1) @ v)


def sparse(m: Channels, x: Tensor) -> Tensor:
    """Of each row the largest scores."""
    q, k, v = m.columns(x)
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * m.temperature
    least = scores.topk(DIM // 2, -1).values[..., -1:]
    return joined(scores.masked_fill(scores < least, -torch.inf).softmax(-1) @ v)


def flipped(m: Channels, x: Tensor) -> Tensor:
    """The largest score minus each."""
    q, k, v = m.columns(x)
    scores = q @ k.mT * 0.1
    return joined((scores.amax(-1, keepdim=True) - scores).softmax(-1) @ v)


def of_all_heads(m: Channels, x: Tensor) -> Tensor:
    """Scores of each channel with those of all heads."""
    q, k, v = m.columns(x)
    k, v = (t.flatten(1, 2).unsqueeze(1) for t in (k, v))
    return joined((q @ k.mT * 0.1).softmax(-1) @ v)


OVER_TOKENS: Mapping[str, Callable[[Channels, Tensor], Tensor]] = {
    f.__name__: f
    for f in (
        normed, chunked_einsum, keys_with_values, called, called_with_scale, called_with_bias,
        called_causal, called_in_groups, called_without_heads, batched, other_side, exponentials,
        own_norm, covariance, correlation, sparse, flipped, of_all_heads,
    )
}  # fmt: skip


class Images(nn.Module):
    """Channel attention over the places of an image [B, C, H, W]."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.mix = OVER_IMAGES[name]
        self.inp = nn.Conv2d(3, HIDDEN, 3, padding=1)
        self.qkv, self.out = nn.Conv2d(HIDDEN, 3 * HIDDEN, 1), nn.Conv2d(HIDDEN, HIDDEN, 1)
        self.near = nn.Conv2d(3 * HIDDEN, 3 * HIDDEN, 3, padding=1, groups=3 * HIDDEN)
        self.gamma = nn.Parameter(torch.rand(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        return x + self.out(self.mix(self, x))


def restored(m: Images, x: Tensor) -> Tensor:
    """Queries, keys and values see their neighbours."""
    batch, _, high, wide = x.shape
    q, k, v = m.near(m.qkv(x)).reshape(batch, 3, HEADS, DIM, high * wide).unbind(1)
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    return ((q @ k.transpose(-2, -1)).softmax(-1) @ v).reshape(batch, HIDDEN, high, wide)


def itself(m: Images, x: Tensor) -> Tensor:
    """Without projections; the more alike, the less."""
    batch, channels, high, wide = x.shape
    flat = x.reshape(batch, channels, -1)
    energy = torch.bmm(flat, flat.permute(0, 2, 1)) * 0.05
    weights = (energy.amax(-1, keepdim=True).expand_as(energy) - energy).softmax(-1)
    return m.gamma * torch.bmm(weights, flat).reshape(batch, channels, high, wide)


def over_both(m: Images, x: Tensor) -> Tensor:
    """Rows and columns are summed over as they are."""
    q, k, v = m.qkv(x).chunk(3, 1)
    scores = torch.einsum("bchw,bdhw->bcd", q, k) * 0.05
    return torch.einsum("bcd,bdhw->bchw", scores.softmax(-1), v)


def called_of_places(m: Images, x: Tensor) -> Tensor:
    batch, _, high, wide = x.shape
    q, k, v = m.qkv(x).flatten(2).unflatten(1, (3, HEADS, DIM)).unbind(1)
    y = F.scaled_dot_product_attention(q, k, v)
    return y.reshape(batch, HIDDEN, high, wide)


OVER_IMAGES: Mapping[str, Callable[[Images, Tensor], Tensor]] = {
    f.__name__: f for f in (restored, itself, over_both, called_of_places)
}


class Decoy(nn.Module):
    """Attention over tokens, [B, N, C] -> [B, N, C]."""

    def __init__(self, name: str, length: int) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.mix, self.wide = DECOYS[name], HIDDEN
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.along, self.up = nn.Linear(length, length), nn.Linear(length, HIDDEN)
        self.down = nn.Linear(HIDDEN, length)
        self.latents = nn.Parameter(torch.randn(length, HIDDEN))
        self.places = nn.Parameter(torch.randn(length, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self, x)


def attend(m: Decoy, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4).unbind(0)
    return m.out(((q @ k.mT * 0.3).softmax(-1) @ v).transpose(1, 2).flatten(2))


def called_of_tokens(m: Decoy, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x + m.places).unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4).unbind(0)
    return m.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def after_a_mixer(m: Decoy, x: Tensor) -> Tensor:
    """A layer along the tokens makes features of them, as of channels."""
    return attend(m, x + m.along(x.mT).mT)


def of_given(m: Decoy, x: Tensor) -> Tensor:
    """No products with parameters before."""
    return m.out(F.scaled_dot_product_attention(x, x, x))


def of_learned(m: Decoy, x: Tensor) -> Tensor:
    """As many learned queries as tokens."""
    q = m.latents.expand(len(x), -1, -1)
    return m.out(F.scaled_dot_product_attention(q, x, x))


DECOYS: Mapping[str, Callable[[Decoy, Tensor], Tensor]] = {
    f.__name__: f for f in (attend, called_of_tokens, after_a_mixer, of_given, of_learned)
}
