"""Which attention weights are dropped: a function of a seed and of global places.

A generator gives its numbers in the order of a tensor's memory, so what it drops depends on which
rank holds what, and in which tiles. Here each (batch, head, query, key) has a number of its own:

    m, r     of (seed, batch, head, query), 32 bits each, m odd
    c        of (seed, batch, head, key), 32 bits
    x        = m c + r                                  modulo 2**32
    number   = x (2 x + 1)                              modulo 2**32

m, r and c come from a mixer of 64 bits (the finalizer of SplitMix64), once for each row and column.
What is left for each pair are a few operations on 32 bits, in place, which a CPU does 8 or 16 at a
time: a product, a sum, a quadratic permutation (that of RC6), whose upper bits depend on all bits
of x. A weight is dropped where its number is among the lowest p 2**32. Any part of a score matrix
gives the same, computed anywhere in any tiles.

Truth values are not made: a comparison to them takes 5 times a comparison in place, filling by them
10 times an "and" (one core with AVX512: 1.0, 0.2, 2.1 and 0.2 ns a weight).

Shapes: B batch, H query heads, Q queries, K keys.
"""

from __future__ import annotations

import torch

__all__ = ["SEEDS", "drop_", "kept", "key_numbers", "row_numbers", "seed_of_part"]

Tensor = torch.Tensor

SEEDS = 1 << 62
"""A seed is a number below it."""


def _signed(number: int) -> int:
    """Of 64 bits, as an int64 has it."""
    return number - (1 << 64) if number >> 63 else number


_STEP = _signed(0x9E3779B97F4A7C15)
_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)
_ROWS, _KEYS = 1, 2
"""Streams of a head: of its queries and of its keys."""


def seed_of_part(seed: Tensor, index: Tensor, outer: int, inner: int, length: int) -> Tensor:
    """int64 [1 + batch]: a seed, and the numbers that a part of a batch has among all entries.

    Parameters
    ----------
    index
        int64 [tokens]: which tokens the part has of a batch [outer, length, inner].
    """
    rows = torch.arange(outer, device=index.device)[:, None, None] * length + index[:, None]
    numbers = rows * inner + torch.arange(inner, device=index.device)
    return torch.cat([seed.reshape(1), numbers.flatten()])


def row_numbers(seed: Tensor, b: Tensor, h: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """m and r of queries: int32 [B, H, Q] each, of the global batch, heads and positions given."""
    mixed = _numbers(seed, b, h, q, _ROWS)
    return mixed.to(torch.int32) | 1, (mixed >> 32).to(torch.int32)


def key_numbers(seed: Tensor, b: Tensor, h: Tensor, k: Tensor) -> Tensor:
    """c of keys: int32 [B, H, K], by query head where several share a key."""
    return (_numbers(seed, b, h, k, _KEYS) >> 32).to(torch.int32)


def kept(m_BHQ: Tensor, r_BHQ: Tensor, c_BHK: Tensor, p: float) -> Tensor:
    """int32 [B, H, Q, K]: 0 for a share p of all on average, all bits set for the others."""
    x = m_BHQ[..., None] * c_BHK[..., None, :]
    x = x.add_(r_BHQ[..., None])
    x = x.addcmul_(x, x, value=2)
    return x.ge_(min(round(p * 2**32), 2**32 - 1) - 2**31).neg_()


def drop_(weights_BHQK: Tensor, kept_BHQK: Tensor) -> Tensor:
    """The weights, of 32 or 64 bits, 0 in place where they are not kept."""
    bits = torch.int64 if weights_BHQK.dtype == torch.float64 else torch.int32
    weights_BHQK.view(bits).bitwise_and_(kept_BHQK.to(bits))
    return weights_BHQK


def _numbers(seed: Tensor, b: Tensor, h: Tensor, n: Tensor, stream: int) -> Tensor:
    """int64 [B, H, N]: 64 random bits for each position."""
    of_batch = _mix(seed + (b + 1) * _STEP)
    of_heads = _mix(of_batch[:, None] + (h + 1) * _STEP)
    return _mix(_mix(of_heads + stream)[..., None] + (n + 1) * _STEP)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """To the right, zeros coming in: an int64's own shift repeats its sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
