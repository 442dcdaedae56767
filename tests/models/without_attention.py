"""Models that mix tokens without attention: convolutions, transforms, scans, layers along them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

__all__ = [
    "FEATURES",
    "HIDDEN",
    "MODELS",
    "TURNED",
    "Around",
    "ResidualImages",
    "StateSpace",
    "drawn",
    "ids",
]

Tensor = torch.Tensor
HIDDEN = 8
VOCABULARY = 30


class Module(nn.Module):
    """Equal weights whenever it is made."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)


# --- convolutions


def causal(dilation: int, outputs: int = HIDDEN) -> nn.Module:
    padded = nn.ConstantPad1d((dilation, 0), 0.0)
    return nn.Sequential(padded, nn.Conv1d(HIDDEN, outputs, 2, dilation=dilation))


class DilatedConvolutions(Module):
    """Residual blocks, each of which sees twice as far back."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(3, HIDDEN, 1)
        self.blocks = nn.ModuleList(causal(2**i) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x).relu()
        return x


class GatedConvolutions(Module):
    """A gate beside each filter, and the sum of all blocks' outputs, as for waves."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.first, self.last = nn.Conv1d(3, HIDDEN, 1), nn.Conv1d(HIDDEN, 3, 1)
        self.blocks = nn.ModuleList(causal(2**i, 2 * HIDDEN) for i in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x, skipped = self.first(x), torch.zeros(())
        for block in self.blocks:
            wave, gate = block(x).chunk(2, 1)
            new = wave.tanh() * gate.sigmoid()
            x, skipped = x + new, skipped + new
        return self.last(skipped.relu())


class ResidualImages(Module):
    """Strided convolutions, a pool and batch norms."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, HIDDEN, 3, 2, 1), nn.BatchNorm2d(HIDDEN)
        self.inner, self.down = nn.Conv2d(HIDDEN, HIDDEN, 3, 1, 1), nn.Conv2d(HIDDEN, 12, 3, 2, 1)
        self.short, self.head = nn.Conv2d(HIDDEN, 12, 1, 2), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.norm(self.first(x)).relu(), 2)
        x = x + self.inner(x).relu()
        x = self.short(x) + self.down(x)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class PooledTokens(Module):
    """Means of neighbours in place of attention, and maxima of overlapping windows."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.norm, self.mlp = nn.GroupNorm(1, 3), nn.Conv1d(3, 3, 1)
        self.mean, self.most = nn.AvgPool1d(3, 1, 1), nn.MaxPool1d(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.mean(y) - y
        return x + self.most(self.mlp(x).relu())


# --- layers along the tokens


class MixedPatches(Module):
    """Linear layers over patches, then over channels."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, HIDDEN, 4, 4), nn.LayerNorm(HIDDEN)
        self.along = nn.Sequential(nn.Linear(length, 12), nn.GELU(), nn.Linear(12, length))
        self.across = nn.Sequential(nn.Linear(HIDDEN, 12), nn.GELU(), nn.Linear(12, HIDDEN))
        self.head = nn.Linear(HIDDEN, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        for _ in range(2):
            x = x + self.along(self.norm(x).mT).mT
            x = x + self.across(self.norm(x))
        return self.head(x.mean(1))


class SpatialGate(Module):
    """Half of the channels, mixed along the tokens, gates the other half."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 2 * HIDDEN)
        self.along, self.last = nn.Conv1d(length, length, 1), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        values, gate = F.gelu(self.inner(self.norm(x))).chunk(2, -1)
        return x + self.last(values * self.along(self.norm(gate)))


class EachToken(Module):
    """Nothing mixes the tokens."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.mlp = nn.Sequential(nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 12), nn.GELU())

    def forward(self, ids: Tensor) -> Tensor:
        return self.mlp(self.embed(ids))


# --- scans


class StateSpace(Module):
    """A selective state space: a short convolution, then sums weighted by a decay."""

    def __init__(self, length: int, loop: bool = False) -> None:
        super().__init__()
        self.embed, self.inner = nn.Embedding(VOCABULARY, HIDDEN), nn.Linear(HIDDEN, 2 * HIDDEN)
        self.short = nn.Conv1d(HIDDEN, HIDDEN, 3, padding=2, groups=HIDDEN)
        self.step, self.last = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.loop = loop

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        x, gate = self.inner(h).chunk(2, -1)
        x = F.silu(self.short(x.mT)[..., : x.shape[1]].mT)
        step = F.softplus(self.step(x))
        y = (in_turn if self.loop else at_once)(step, step * x)
        return h + self.last(y * F.silu(gate))


def at_once(step: Tensor, x: Tensor) -> Tensor:
    decay = -step.cumsum(1)
    return decay.exp() * (x * (-decay).exp()).cumsum(1)


def in_turn(step: Tensor, x: Tensor) -> Tensor:
    state, states = torch.zeros_like(x[:, 0]), []
    for i in range(x.shape[1]):
        state = state * (-step[:, i]).exp() + x[:, i]
        states.append(state)
    return torch.stack(states, 1)


# --- transforms


class FourierMixing(Module):
    """The real part of a transform of tokens and channels."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(VOCABULARY, HIDDEN), nn.LayerNorm(HIDDEN)
        self.mlp, self.places = nn.Linear(HIDDEN, HIDDEN), nn.Parameter(torch.randn(length, HIDDEN))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.places
        for _ in range(2):
            x = self.norm(x + torch.fft.fft2(x, dim=(-2, -1)).real)
            x = self.norm(x + self.mlp(x).relu())
        return x


class LongConvolution(Module):
    """A gated convolution with a filter as long as the sequence, which a small net makes."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.net = nn.Sequential(nn.Linear(2, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN))
        self.through = nn.Parameter(torch.randn(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        first, second, v = self.inner(x).chunk(3, -1)
        time = torch.linspace(0, 1, length, dtype=x.dtype)[:, None]
        kernel = self.net(torch.cat([time, (6 * time).sin()], -1))
        v = v * first
        found = torch.fft.rfft(v, n=2 * length, dim=1) * torch.fft.rfft(kernel, 2 * length, 0)
        y = torch.fft.irfft(found, n=2 * length, dim=1)[:, :length] + v * self.through
        return self.last(y * second)


class FrequencyBlocks(Module):
    """Layers of blocks of channels between a transform of an image and its inverse."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.patches, self.weight = nn.Conv2d(3, 8, 2, 2), nn.Parameter(torch.randn(2, 2, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).permute(0, 2, 3, 1)
        sizes = x.shape[1:3]
        f = torch.fft.rfft2(x, dim=(1, 2), norm="ortho").unflatten(-1, (2, 4))
        f = torch.einsum("bhwnc,ncd->bhwnd", f, torch.complex(*self.weight))
        f = torch.complex(f.real.relu(), f.imag.relu()).flatten(-2)
        return x + torch.fft.irfft2(f, s=sizes, dim=(1, 2), norm="ortho")


def drawn(*sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(sum(sizes)))


def ids(length: int) -> Tensor:
    given = torch.Generator().manual_seed(length)
    return torch.randint(0, VOCABULARY, (2, length), generator=given)


MODELS: Mapping[str, tuple[Callable[[int], nn.Module], Callable[[int], Tensor]]] = {
    "dilated convolutions": (DilatedConvolutions, lambda n: drawn(2, 3, n)),
    "gated convolutions": (GatedConvolutions, lambda n: drawn(2, 3, n)),
    "pooled tokens": (PooledTokens, lambda n: drawn(2, 3, n)),
    "mixed patches": (lambda n: MixedPatches(2 * n), lambda n: drawn(2, 3, 4 * n, 8)),
    "spatial gate": (SpatialGate, lambda n: drawn(2, n, HIDDEN)),
    "each token": (EachToken, ids),
    "state space": (StateSpace, ids),
    "Fourier mixing": (FourierMixing, ids),
    "long convolution": (LongConvolution, lambda n: drawn(2, n, HIDDEN)),
    "frequency blocks": (FrequencyBlocks, lambda n: drawn(2, 3, 2 * n, 12)),
}
"""Of so many tokens, and an input of theirs."""


class Around(Module):
    """Something that needs all tokens, between two layers."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.filter = nn.Parameter(torch.randn(32, HIDDEN, 2))
        self.body = TURNED[name]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(self, self.first(x)))


def filtered(m: Any, x: Tensor) -> Tensor:
    f = torch.fft.rfft(x, dim=1)
    f = f * torch.view_as_complex(m.filter)[: f.shape[1]]
    return torch.fft.irfft(f, n=x.shape[1], dim=1)


def shifted_spectrum(m: Any, x: Tensor) -> Tensor:
    f = torch.fft.fftshift(torch.fft.fft(x.mT), dim=-1)
    return x + torch.fft.ifft(f, norm="ortho").mT.imag


def weighed_places(m: Any, x: Tensor) -> Tensor:
    values, places = x.sort(1, descending=True)
    return values * places.to(x.dtype).cos()


TURNED: Mapping[str, Callable[[Any, Tensor], Tensor]] = {
    "filter": filtered,
    "filter and what it filters": lambda m, x: x + filtered(m, x).relu(),
    "shifted spectrum": shifted_spectrum,
    "two transforms in turn": lambda m, x: torch.fft.fft(torch.fft.fft(x), dim=-2).real,
    "sorted": lambda m, x: x + x.sort(1).values.sin(),
    "sorted, with places": weighed_places,
    "ranks of tokens": lambda m, x: x * x.argsort(1).argsort(1).to(x.dtype),
    "less the median": lambda m, x: x - x.median(1, keepdim=True).values,
    "the largest few": lambda m, x: x + x.topk(3, 1).values.sum(1, keepdim=True),
    "product": lambda m, x: x + (x.sigmoid() + 0.5).prod(1, keepdim=True),
    "quantile": lambda m, x: x - x.kthvalue(5, 1, keepdim=True).values,
}


class Features(Module):
    """Decoy: no tokens, though its features are as many."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.last = nn.LayerNorm(40), nn.Linear(40, 64), nn.Linear(64, 40)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        x = x + self.last(self.first(self.norm(x)).relu())
        return F.cross_entropy(x, labels)


class Table(Module):
    """Decoy: what is looked up for each example has no neighbours either."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mlp = nn.Embedding(VOCABULARY, 32), nn.Linear(64, 8)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return self.mlp(torch.cat([self.embed(user[:, 0]), self.embed(item[:, 0])], -1))


FEATURES: Mapping[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "features": (Features, (drawn(16, 40), torch.arange(16))),
    "table": (Table, (torch.arange(16)[:, None], torch.arange(16)[:, None])),
}
