"""Random masks in torch operators: any expression of the grammar, drawn by a seed.

number  = row | column | head | constant | document | table[number] | number (+ - *) number
        | number // c | number % c | abs, clamp, min, max of numbers | where(truth, number, number)
truth   = number (<= < >= > == !=) number | truth (and or xor) truth | not truth | padding
        | where(truth, truth, truth) | tril or triu of truth | reshaped(truth)
reshaped = a slice of something larger, two parts joined, padded, flipped twice, rolled,
        merged dimensions, repeated heads, an outer product
mask    = truth | additive(truth) + ... | truth chosen by arithmetic
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

Tensor = torch.Tensor
LOW = (-torch.inf, -1e9, -1e4, torch.finfo(torch.float32).min)


@dataclass(frozen=True, eq=False)
class Sizes:
    batch: int
    heads: int
    q: int
    k: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.heads, self.q, self.k


@dataclass(frozen=True, eq=False)
class Given:
    """The inputs of a mask: document starts and padding of queries and keys, a table, slopes."""

    q_starts: Tensor
    k_starts: Tensor
    q_kept: Tensor
    k_kept: Tensor
    table: Tensor
    slopes: Tensor


def given(sizes: Sizes, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)

    def starts(length: int) -> Tensor:
        return (torch.rand(sizes.batch, length, generator=generator) < 0.3).long()

    def kept(length: int) -> Tensor:
        return torch.rand(sizes.batch, length, generator=generator) < 0.8

    return (
        starts(sizes.q),
        starts(sizes.k),
        kept(sizes.q),
        kept(sizes.k).long(),
        torch.randint(-3, 9, (16, sizes.heads), generator=generator),
        torch.randn(sizes.heads, generator=generator),
    )


@dataclass(frozen=True, eq=False)
class Writer:
    """Writes one random expression; every value broadcasts to [batch, heads, q, k]."""

    rng: random.Random
    sizes: Sizes
    given: Given | None

    def number(self, depth: int) -> Tensor:
        if depth <= 0:
            return self._pick(self._leaves())()
        inner = lambda: self.number(depth - 1)  # noqa: E731
        c = self.rng.randint(1, 5)
        return self._pick(
            [
                lambda: inner() + inner(),
                lambda: inner() - inner(),
                lambda: inner() * self.rng.choice((-2, 2, 3)),
                lambda: inner() // c,
                lambda: inner() % c,
                lambda: torch.div(inner(), c, rounding_mode="trunc"),
                lambda: inner().abs(),
                lambda: inner().clamp(-c, c + 2),
                lambda: torch.minimum(inner(), inner()),
                lambda: torch.maximum(inner(), inner()),
                lambda: torch.where(self.truth(depth - 1), inner(), inner()),
                lambda: self.truth(depth - 1).long() * inner(),
                lambda: inner().float().mul(2).long(),
                lambda: self._looked_up(inner()),
            ]
        )()

    def _leaves(self) -> list[Callable[[], Tensor]]:
        row = lambda: torch.arange(self.sizes.q)[:, None]  # noqa: E731
        column = lambda: torch.arange(self.sizes.k)[None, :]  # noqa: E731
        found = [row, column, row, column, lambda: torch.tensor(self.rng.randint(-2, 6))]
        found.append(lambda: torch.arange(self.sizes.heads)[:, None, None])
        g = self.given
        if g is not None:
            found += [
                lambda: g.q_starts.cumsum(1)[:, None, :, None],
                lambda: g.k_starts.cumsum(1)[:, None, None, :],
                lambda: g.k_kept[:, None, None, :],
            ]
        return found

    def _looked_up(self, place: Tensor) -> Tensor:
        if self.given is None:
            return place
        heads = torch.arange(self.sizes.heads)[:, None, None]
        inside = place.clamp(0, 15)
        return self._pick(
            [
                lambda: self.given.table[inside, heads],  # type: ignore[union-attr]
                lambda: self.given.table[place % 16 - 16, heads],  # type: ignore[union-attr]
                lambda: F.embedding(inside, self.given.table)[..., 0],  # type: ignore[union-attr]
            ]
        )()

    def truth(self, depth: int) -> Tensor:
        if depth <= 0:
            return self._compared(0)
        inner = lambda: self.truth(depth - 1)  # noqa: E731
        return self._pick(
            [
                lambda: self._compared(depth - 1),
                lambda: self._compared(depth - 1),
                lambda: inner() & inner(),
                lambda: inner() | inner(),
                lambda: inner() ^ inner(),
                lambda: ~inner(),
                lambda: torch.where(inner(), inner(), inner()),
                lambda: self._whole(inner()).tril(self.rng.randint(-2, 2)),
                lambda: self._whole(inner()).triu(self.rng.randint(-2, 2)),
                lambda: inner().float() * inner().float() > 0.5,
                lambda: (1 - inner().int()) == 0,
                lambda: self._padding(),
                lambda: self._reshaped(depth - 1),
                lambda: self._reshaped(depth - 1),
            ]
        )()

    def _compared(self, depth: int) -> Tensor:
        compare = self.rng.choice((torch.le, torch.lt, torch.ge, torch.gt, torch.eq, torch.ne))
        return compare(self.number(depth), self.number(depth))

    def _padding(self) -> Tensor:
        g = self.given
        if g is None:
            return torch.arange(self.sizes.k) < self.rng.randint(1, self.sizes.k)
        return self._pick(
            [
                lambda: g.q_kept[:, None, :, None],
                lambda: g.k_kept[:, None, None, :].bool(),
                lambda: g.k_kept[:, None, None, :] == 1,
                lambda: g.q_kept[:, None, :, None] & (g.k_kept > 0)[:, None, None, :],
            ]
        )()

    def _whole(self, x: Tensor) -> Tensor:
        return x.expand(self.sizes.shape)

    def _reshaped(self, depth: int) -> Tensor:
        sizes, r = self.sizes, self.rng
        b, h, q, k = sizes.shape
        inner = lambda: self._whole(self.truth(depth))  # noqa: E731
        larger = replace(self, sizes=Sizes(b, h, q + 3, k + 2), given=None)
        if k < 4:
            return inner()
        left = r.randint(1, k - 1)
        narrow = replace(self, sizes=Sizes(b, h, q, left), given=None)
        rest = replace(self, sizes=Sizes(b, h, q, k - left), given=None)
        shift = r.randint(-3, 3)
        return self._pick(
            [
                lambda: larger._whole(larger.truth(depth))[:, :, :q, :k],
                lambda: larger._whole(larger.truth(depth))[:, :, -q:, 2:],
                lambda: torch.cat(
                    [narrow._whole(narrow.truth(depth)), rest._whole(rest.truth(depth))], -1
                ),
                lambda: F.pad(narrow._whole(narrow.truth(depth)), (0, k - left), value=True),
                lambda: inner().flip(-1),
                lambda: inner().roll(shift, -2),
                lambda: inner().reshape(b * h, q * k).view(b, h, q, k),
                lambda: inner().reshape(b, h * q, k).unflatten(1, (h, q)),
                lambda: (
                    inner().transpose(1, 2).reshape(b, q, h * k).view(b, q, h, k).transpose(1, 2)
                ),
                lambda: inner()[:, :1].repeat(1, h, 1, 1),
                lambda: torch.stack([inner(), inner()], 0)[r.randint(0, 1)],
                lambda: inner().permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
                lambda: torch.cat(inner().split([left, k - left], -1)[::-1], -1),
                lambda: inner()[:, :, torch.arange(q).flip(0)],
                lambda: inner()[..., torch.arange(k) - k],
                lambda: inner().gather(-1, torch.arange(k).flip(0).expand(b, h, q, k)),
                lambda: self._scattered(inner()),
            ]
        )()

    def _scattered(self, x: Tensor) -> Tensor:
        """A row and a corner written over."""
        row = torch.ones_like(x[:, :, 0])
        corner = torch.zeros_like(x[..., :2])
        return x.select_scatter(row, 2, -1).slice_scatter(corner, 3, 1, 3)

    def additive(self, depth: int) -> Tensor:
        low = self.rng.choice(LOW)
        truth = self.truth(depth)
        return self._pick(
            [
                lambda: torch.where(truth, 0.0, low),
                lambda: torch.zeros(truth.shape).masked_fill(~truth, low),
                lambda: torch.full(self.sizes.shape, -torch.inf).masked_fill(truth, 0.0),
                lambda: (1.0 - truth.float()) * -1e9,
                lambda: (
                    self.additive(depth - 1) + self.additive(depth - 1)
                    if depth > 0
                    else torch.where(truth, 0.0, low)
                ),
                lambda: self._sloped().masked_fill(~truth, low),
                lambda: torch.where(truth, self._sloped(), low),
                lambda: self._sloped() + torch.where(truth, 0.0, low),
            ]
        )()

    def _sloped(self) -> Tensor:
        distance = torch.arange(self.sizes.k) - torch.arange(self.sizes.q)[:, None]
        if self.given is None:
            return distance * 0.5
        return self.given.slopes[:, None, None] * distance.abs()

    def _pick(self, choices: list[Callable[[], Tensor]]) -> Callable[[], Tensor]:
        return self.rng.choice(choices)


def written(seed: int, sizes: Sizes, depth: int, additive: bool) -> Callable[..., Tensor]:
    """The mask of a seed as a function of ``given(sizes, seed)``, of the whole shape."""

    def mask(*inputs: Tensor) -> Tensor:
        writer = Writer(random.Random(seed), sizes, Given(*inputs))
        found = writer.additive(depth) if additive else writer.truth(depth)
        return found.expand(sizes.shape)

    return mask
