"""Numbers that are trained inside scores: temperatures, caps, slopes, powers, gates and sinks.

Beside them what looks alike and is none, or hides keys where a softmax cannot know it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tests.passes.detect.spellings_eager import (
    MIN,
    B,
    D,
    E,
    H,
    S,
    Weights,
    causal,
    heads,
    merge,
    qkv,
    scored,
)

Tensor = torch.Tensor


class Trained(Weights):
    """With numbers: one alone, one in a list, one a head, one a distance."""

    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__(body)
        self.alone, self.gate = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.tensor(-0.3))
        self.listed = nn.Parameter(torch.tensor([0.6]))
        self.by_head = nn.Parameter(torch.rand(H, 1, 1) + 0.4)
        self.slopes = nn.Parameter(torch.rand(H) + 0.1)
        self.by_pair = nn.Parameter(torch.rand(S, S))


def far() -> Tensor:
    return (torch.arange(S)[:, None] - torch.arange(S)).abs()


def two_contents(w: Trained, x: Tensor) -> Tensor:
    """Two products of their own, mixed by a trained gate."""
    q, k, v = qkv(w, x)
    share = w.gate.sigmoid()
    s = share * (q @ k.mT) + (1 - share) * (q.tanh() @ k.flip(-1).mT)
    return w.o(merge(s.softmax(-1) @ v))


def sunk(w: Trained, x: Tensor, column: Tensor) -> Tensor:
    q, k, v = qkv(w, x)
    s = torch.cat([(q @ k.mT * 0.3).masked_fill(~causal(), -math.inf), column], -1)
    return w.o(merge(s.softmax(-1)[..., :-1] @ v))


def gated(w: Trained, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """A sink as a gate: the share of a row's weight that its keys have."""
    q, k, v = qkv(w, x)
    s = change(q @ k.mT * 0.3)
    share = torch.sigmoid(s.logsumexp(-1, keepdim=True) - w.sinks.view(1, H, 1, 1))
    return w.o(merge(s.softmax(-1) @ v * share))


def with_z_loss(w: Trained, x: Tensor) -> Tensor:
    q, k, v = qkv(w, x)
    s = w.alone * (q @ k.mT)
    out: Tensor = w.o(merge(masked(s).softmax(-1) @ v))
    return out + torch.logsumexp(masked(s), -1).square().mean()


def with_own_z_loss(w: Trained, x: Tensor) -> Tensor:
    q, k, v = qkv(w, x)
    s = masked(q @ k.mT - w.by_head * far())
    out: Tensor = w.o(merge(s.softmax(-1) @ v))
    return out + s.logsumexp(-1).square().mean()


def by_head(value: Tensor) -> Tensor:
    return value.reshape(1, -1, 1, 1).expand(B, H, S, 1)


def given(bias: Callable[[Trained], Tensor]) -> Callable[..., Tensor]:
    """A bias given to torch's function."""

    def body(w: Trained, x: Tensor) -> Tensor:
        q, k, v = qkv(w, x)
        return w.o(merge(F.scaled_dot_product_attention(q, k, v, bias(w).to(q.dtype))))

    return body


def masked(s: Tensor) -> Tensor:
    return s.masked_fill(~causal(), -math.inf)


def low(s: Tensor) -> Tensor:
    """A number of any sign times -inf would be NaN in backward."""
    return s.masked_fill(~causal(), -1e9)


TRAINED: Mapping[str, Callable[..., Any]] = {
    # A scale of a distance.
    "slope, alone": scored(lambda w, s: s - w.alone * far()),
    "slope, listed": scored(lambda w, s: masked(s - w.listed * far())),
    "slope, by head": scored(lambda w, s: s - w.by_head * far()),
    "slopes": scored(lambda w, s: masked(s + w.slopes[:, None, None] * -far())),
    "slope, exp": scored(lambda w, s: s - w.alone.exp() * far()),
    "slope, softplus": scored(lambda w, s: s - F.softplus(w.by_head) * far()),
    "slope, clamped": scored(lambda w, s: s - w.slopes.clamp(0.2, 0.5).view(H, 1, 1) * far()),
    "slope, rounded": scored(lambda w, s: s - (w.alone + w.listed.round()) * far()),
    "slope, looked up": scored(lambda w, s: s + w.alone * w.by_pair[far(), 0]),
    "logarithm": scored(lambda w, s: s - w.alone * torch.log1p(w.by_head * far())),
    "power of a distance": scored(lambda w, s: s - w.alone * far().double() ** w.by_head),
    "largest of two": scored(lambda w, s: s - torch.maximum(w.alone * far(), w.by_head * 2.0)),
    "gated bias": scored(lambda w, s: (1 - w.gate.sigmoid()) * s + w.gate.sigmoid() * w.by_pair),
    "slope, given": given(lambda w: masked(-w.alone * far().double())),
    "slopes, given": given(lambda w: masked(-w.by_head * far())),
    # A temperature.
    "temperature, alone": scored(lambda w, s: s * w.alone),
    "temperature, listed": scored(lambda w, s: masked(s / w.listed)),
    "temperature, by head": scored(lambda w, s: s * w.by_head),
    "temperature, exp": scored(lambda w, s: masked(s * w.alone.exp().clamp(max=100.0))),
    "temperature, softplus": scored(lambda w, s: s / F.softplus(w.by_head)),
    "temperature, power": scored(lambda w, s: s * 2.0**w.alone),
    "after a bias": scored(lambda w, s: masked((s - 0.1 * far()) * w.alone)),
    "after a bias, by head": scored(lambda w, s: (s - w.alone * far()) / w.by_head),
    "after a mask": scored(lambda w, s: low(s) / F.softplus(w.by_head)),
    "after a bias and a mask": scored(lambda w, s: low(s - far()) * w.alone.exp() + w.by_pair),
    # A soft cap.
    "cap": scored(lambda w, s: w.alone * torch.tanh(s / w.alone)),
    "cap, masked": scored(lambda w, s: masked(w.by_head * (s / w.by_head).tanh())),
    "cap, lowest": scored(
        lambda w, s: (w.listed * (s / w.listed).tanh()).masked_fill(~causal(), MIN)
    ),
    "cap, softplus": scored(lambda w, s: F.softplus(w.alone) * (s / F.softplus(w.alone)).tanh()),
    "cap, constant inside": scored(lambda w, s: w.alone * (s / 2.0).tanh()),
    "cap after a bias": scored(lambda w, s: masked(3.0 * ((s - far()) / 3.0).tanh())),
    "cap, trained, after a bias": scored(
        lambda w, s: w.alone * ((s - w.by_head * far()) / w.alone).tanh()
    ),
    "cap, scaled": scored(lambda w, s: masked(2.0 * (w.alone * (s / w.alone).tanh()) - far())),
    # A function of each score.
    "relu": scored(lambda w, s: s.relu()),
    "clamped": scored(lambda w, s: s.clamp(-0.1, 0.1)),
    "clamped, lifted": scored(lambda w, s: torch.maximum(s, w.alone * far())),
    "power": scored(lambda w, s: masked(s.sign() * s.abs() ** w.alone)),
    "power of a sigmoid": scored(lambda w, s: s.sigmoid() ** w.by_head),
    "square": scored(lambda w, s: s.square() * w.alone),
    "swish": scored(lambda w, s: masked(s * torch.sigmoid(w.by_head * s))),
    "leaky": scored(lambda w, s: torch.where(s > 0, s, w.alone * s)),
    "mixed": scored(lambda w, s: w.gate.sigmoid() * s + (1 - w.gate.sigmoid()) * s.tanh()),
    "mixed, by head": scored(lambda w, s: masked(s + w.by_head * s - s.abs())),
    "difference": scored(lambda w, s: s - w.alone * (s * w.by_head).tanh()),
    "filled weakly": scored(lambda w, s: s.masked_fill(~causal(), -2.0)),
    "filled weakly, then masked": scored(
        lambda w, s: torch.where(causal(), s, -2.0) + torch.where(torch.arange(S) > 1, 0.0, MIN)
    ),
    "filled with a number": scored(lambda w, s: torch.where(far() > 2, w.alone.double(), s)),
    # Scores times a number for each pair.
    "times a mask": scored(lambda w, s: s * causal().to(s.dtype)),
    "times a mask, then masked": scored(
        lambda w, s: s * causal().to(s.dtype) + torch.where(torch.arange(S) > 1, 0.0, MIN)
    ),
    "times a decay": scored(lambda w, s: masked(s * torch.exp(-w.by_head * far()))),
    "times a constant decay": scored(lambda w, s: s * 0.9 ** far()),
    "times a matrix": scored(lambda w, s: s * w.by_pair),
    "over a matrix": scored(lambda w, s: masked(s / (1 + w.by_pair))),
    "times a wave": scored(lambda w, s: s * torch.cos(w.alone * far())),
    "times a running sum": scored(
        lambda w, s: s + 0.1 * torch.arange(S * S).view(S, S).sin().cumsum(-1) * s
    ),
    # Products with factors of their own.
    "two contents": two_contents,
    # A logsumexp that is read.
    "gated by a sink": lambda w, x: gated(w, x, lambda s: s),
    "gated by a sink, masked": lambda w, x: gated(w, x, masked),
    "gated by a sink, capped": lambda w, x: gated(w, x, lambda s: w.alone * (s / w.alone).tanh()),
    "z-loss": with_z_loss, "z-loss of the same scores": with_own_z_loss,
    # A column of logits.
    "sink": lambda w, x: sunk(w, x, by_head(w.sinks)),
    "sink, scaled": lambda w, x: sunk(w, x, by_head(w.sinks * 2.0)),
    "sink, exp": lambda w, x: sunk(w, x, by_head(w.slopes.exp())),
    "sink, warmed": lambda w, x: sunk(w, x, by_head(w.sinks * w.alone)),
    "sink, alone": lambda w, x: sunk(w, x, w.alone.expand(B, H, S, 1)),
    "sink, listed": lambda w, x: sunk(w, x, w.listed.softmax(-1).log().expand(B, H, S, 1)),
}  # fmt: skip
"""Each takes w and x."""


def sink_of_queries(w: Trained, x: Tensor) -> Tensor:
    return sunk(w, x, heads(w.q(x)).sum(-1, keepdim=True))


TRAINED_DECOYS: Mapping[str, Callable[..., Any]] = {
    "cap after a mask": scored(lambda w, s: w.alone * (masked(s) / w.alone).tanh()),
    "cap after a low mask": scored(
        lambda w, s: 5.0 * (s.masked_fill(~causal(), -1e9) / 5.0).tanh()
    ),
    "a mask that a number of any sign scales": scored(lambda w, s: masked(s) * w.alone),
    "a low bias, squashed": scored(lambda w, s: (s + torch.where(causal(), 0.0, -1e9)).sigmoid()),
    "of its row": scored(lambda w, s: s / s.amax(-1, keepdim=True)),
    "of its deviation": scored(lambda w, s: w.alone * (s / s.std(-1, keepdim=True))),
    "of two contents": scored(lambda w, s: s * (s.mT)),
    "only compared": scored(lambda w, s: (s > w.alone).to(s.dtype)),
    "a sink of each query": sink_of_queries,
    "over heads": lambda w, x: w.o(
        merge(torch.softmax(w.alone * heads(w.q(x)) @ heads(w.k(x)).mT, 1) @ heads(w.v(x)))
    ),
}  # fmt: skip
assert E == H * D
