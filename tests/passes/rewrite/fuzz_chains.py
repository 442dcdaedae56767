"""Layers drawn one after the other: attention of every reach, scans, transforms, windows, picks.

    python -m tests.passes.rewrite.fuzz_chains FIRST LAST

Each seed draws up to four layers, a length and a number of ranks. The split model has the unsplit
one's outputs and gradients, or it is refused by a ``RingfxError``.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from ringfx.errors import RingfxError
from tests.support.split_here import split_here

__all__ = ["Chain", "check"]

Tensor = torch.Tensor
HIDDEN, HEADS, WINDOW = 8, 2, 4
LENGTHS = (8, 12, 13, 16, 17, 24, 28)
TABLE = 64
"""Rows of tables of positions and of images; no length has more."""


class Layer(nn.Module):
    """One kind of layer on [B, S, HIDDEN], with all weights that any may need."""

    def __init__(self, kind: str, length: int) -> None:
        super().__init__()
        self.norm, self.one = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.qkv, self.kv = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, 2 * HIDDEN)
        self.near = nn.Conv1d(HIDDEN, HIDDEN, 3, padding=1, groups=HIDDEN)
        self.down, self.along = nn.Conv1d(HIDDEN, HIDDEN, 4, 2, 1), nn.Linear(length, length)
        self.latents = nn.Parameter(torch.randn(2, HIDDEN))
        self.table = nn.Parameter(torch.randn(TABLE, HIDDEN) / 3)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        return KINDS[self.kind](self, self.norm(x), x)

    def attend(self, y: Tensor, causal: bool = False) -> Tensor:
        q, k, v = map(_heads, self.qkv(y).chunk(3, -1))
        return _joined(F.scaled_dot_product_attention(q, k, v, is_causal=causal))

    def cross(self, queries: Tensor, y: Tensor) -> Tensor:
        k, v = map(_heads, self.kv(y).chunk(2, -1))
        return _joined(F.scaled_dot_product_attention(_heads(self.one(queries)), k, v))


def _heads(y: Tensor) -> Tensor:
    return y.unflatten(-1, (HEADS, -1)).transpose(-2, -3)


def _joined(y: Tensor) -> Tensor:
    return y.transpose(-2, -3).flatten(-2)


Kind = Callable[[Layer, Tensor, Tensor], Tensor]


def _windows(shift: int) -> Kind:
    def kind(m: Layer, y: Tensor, x: Tensor) -> Tensor:
        length = y.shape[1]
        y = F.pad(y, (0, 0, 0, -length % WINDOW)).roll(-shift, 1)
        z = m.attend(y.unflatten(1, (-1, WINDOW))).flatten(1, 2)
        return x + z.roll(shift, 1)[:, :length]

    return kind


def _grid(columns: bool) -> Kind:
    def kind(m: Layer, y: Tensor, x: Tensor) -> Tensor:
        if y.shape[1] % WINDOW:
            return x + m.one(y)
        z = y.unflatten(1, (-1, WINDOW))
        z = m.attend(z.transpose(1, 2)).transpose(1, 2) if columns else m.attend(z)
        return x + z.flatten(1, 2)

    return kind


def _latents(m: Layer, y: Tensor, x: Tensor) -> Tensor:
    few = m.cross(m.latents.expand(len(y), -1, -1), y)
    return x + m.cross(y, few)


def _pool(m: Layer, y: Tensor, x: Tensor) -> Tensor:
    return x * (1 + m.cross(m.latents[:1].expand(len(y), -1, -1), y).sigmoid())


def _state_space(m: Layer, y: Tensor, x: Tensor) -> Tensor:
    decay = (F.softplus(m.one(y)) / 10).cumsum(1)
    return x + (-decay).exp() * (y * decay.exp()).cumsum(1) / 10


def _transform(m: Layer, y: Tensor, x: Tensor) -> Tensor:
    n = y.shape[1]
    f = torch.fft.rfft(y, n=2 * n, dim=1) * torch.fft.rfft(m.table[:n], n=2 * n, dim=0)
    return x + torch.fft.irfft(f, n=2 * n, dim=1)[:, :n]


def _down_and_up(m: Layer, y: Tensor, x: Tensor) -> Tensor:
    z = F.interpolate(m.down(y.mT).relu(), scale_factor=2).mT[:, : y.shape[1]]
    return x + F.pad(z, (0, 0, 0, y.shape[1] - z.shape[1]))


def _unfolded(m: Layer, y: Tensor, x: Tensor) -> Tensor:
    if y.shape[1] % WINDOW:
        return x + m.one(y).roll(1, 1)
    q = y.unflatten(1, (-1, WINDOW))
    k = F.pad(m.one(y), (0, 0, WINDOW, WINDOW)).unfold(1, 3 * WINDOW, WINDOW)
    return x + ((q @ k / 3).softmax(-1) @ k.mT).flatten(1, 2)


def _first_half(m: Layer, y: Tensor, x: Tensor) -> Tensor:
    half = y.shape[1] // 2
    return torch.cat([x[:, :half] + m.one(y[:, :half]), x[:, half:]], 1)


def _first_token(m: Layer, y: Tensor, x: Tensor) -> Tensor:
    first = m.latents[:1] + y.mean(1, keepdim=True)
    return torch.cat([first, x[:, 1:]], 1)


def _segments(m: Layer, y: Tensor, x: Tensor) -> Tensor:
    if y.shape[1] % 2:
        return x + y
    means = m.one(y).unflatten(1, (-1, 2)).mean(2)
    return x + means.repeat_interleave(2, 1)


def _in_order(m: Layer, y: Tensor, x: Tensor) -> Tensor:
    return x + m.one(y).gather(1, y[..., :1].argsort(1).expand_as(y))


def _images(m: Layer, y: Tensor, x: Tensor) -> Tensor:
    return x.masked_scatter((y[..., :1] > 0.5).expand_as(x), m.table) + m.one(y)


def _every_second(m: Layer, y: Tensor, x: Tensor) -> Tensor:
    z = m.one(y)[:, ::2]
    return x + F.pad(z, (0, 0, 0, y.shape[1] - z.shape[1]))


def _outer_products(m: Layer, y: Tensor, x: Tensor) -> Tensor:
    return x + torch.einsum("bic,bjc->bij", m.one(y), y).tanh().mean(2, keepdim=True)


KINDS: Mapping[str, Kind] = {
    "attention": lambda m, y, x: x + m.attend(y),
    "causal": lambda m, y, x: x + m.attend(y, causal=True),
    "windows": _windows(0),
    "shifted windows": _windows(2),
    "rows": _grid(False),
    "columns": _grid(True),
    "latents": _latents,
    "pool": _pool,
    "unfolded": _unfolded,
    "running sum": lambda m, y, x: x + m.one(y).cumsum(1) / y.shape[1],
    "state space": _state_space,
    "transform": _transform,
    "down and up": _down_and_up,
    "convolution": lambda m, y, x: x + m.near(y.mT).mT,
    "along": lambda m, y, x: x + m.along(y.mT).mT,
    "each token": lambda m, y, x: x + m.one(F.gelu(m.one(y))),
    "flip": lambda m, y, x: x + m.one(y.flip(1)),
    "roll": lambda m, y, x: x + m.one(y.roll(3, 1)),
    "sort": lambda m, y, x: x + m.one(y).sort(1).values,
    "largest": lambda m, y, x: x + m.one(y).topk(3, 1).values.sum(1, keepdim=True),
    "in order": _in_order,
    "mean": lambda m, y, x: x + m.one(y.mean(1, keepdim=True)),
    "maximum": lambda m, y, x: x + y.amax(1, keepdim=True),
    "softmax": lambda m, y, x: x * (1 + y.softmax(1)),
    "group norm": lambda m, y, x: x + F.group_norm(y.mT, 2, m.latents[0]).mT,
    "neighbours": lambda m, y, x: x + F.avg_pool1d(y.mT, 3, 1, 1).mT,
    "differences": lambda m, y, x: x + m.one(y.diff(dim=1, prepend=y[:, :1])),
    "positions": lambda m, y, x: x + m.table[: y.shape[1]],
    "first half": _first_half,
    "first token": _first_token,
    "segments": _segments,
    "mask": lambda m, y, x: x.masked_fill(y[..., :1] > 0.7, 0.1) + m.one(y),
    "images": _images,
    "every second": _every_second,
    "outer products": _outer_products,
}
ENDS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "all": lambda y: y,
    "mean": lambda y: y.mean(1),
    "last": lambda y: y[:, -1],
}


class Model(nn.Module):
    def __init__(self, chain: Chain) -> None:
        super().__init__()
        torch.manual_seed(chain.seed)
        self.inp, self.out = nn.Linear(4, HIDDEN), nn.Linear(HIDDEN, 3)
        self.layers = nn.ModuleList(Layer(kind, chain.length) for kind in chain.kinds)
        self.end = ENDS[chain.end]

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for layer in self.layers:
            x = layer(x)
        return self.end(self.out(x))


@dataclass(frozen=True, kw_only=True)
class Chain:
    """What a seed draws."""

    seed: int
    kinds: tuple[str, ...]
    length: int
    ranks: int
    end: str

    @staticmethod
    def of(seed: int) -> Chain:
        draw = random.Random(seed)
        return Chain(
            seed=seed, kinds=tuple(draw.choices([*KINDS], k=draw.randint(1, 4))),
            length=draw.choice(LENGTHS), ranks=draw.choice((2, 2, 3)), end=draw.choice([*ENDS]),
        )  # fmt: skip

    def __str__(self) -> str:
        return f"{self.seed}: {', '.join(self.kinds)}, {self.length} tokens, {self.ranks} ranks"


def check(chain: Chain) -> str:
    """``equal``, ``equal, gathered ...``, ``refused: ...`` or what is wrong."""
    x = torch.randn(2, chain.length, 4, generator=torch.Generator().manual_seed(chain.seed))
    try:
        found = split_here(Model(chain), (x,), chain.ranks)
    except RingfxError as error:
        return f"refused: {type(error).__name__}: {str(error)[:200]}"
    except Exception as error:
        return f"FAILED {type(error).__name__}: {str(error)[:300]}"
    if not found.worst < 1e-8:
        return f"WRONG by {found.worst:.1e}"
    if not found.program.plan.is_split:
        return "NOTHING IS SPLIT"
    return f"equal, gathered {'; '.join(found.gathered)}" if found.gathered else "equal"


def main() -> None:
    counts: Counter[str] = Counter()
    for seed in range(int(sys.argv[1]), int(sys.argv[2])):
        chain = Chain.of(seed)
        said = check(chain)
        counts[said.split(":")[0].split(" gathered")[0]] += 1
        if not said.startswith("equal"):
            print(f"{chain}: {said}", flush=True)
    print(dict(counts))


if __name__ == "__main__":
    main()
