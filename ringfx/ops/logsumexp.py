"""Logsumexps of rows whose keys a bias hides all, with a number such as -1e9 instead of -inf.

Unsplit, the scores of such a row vanish beside the number, and all keys share the weight. The row's
logsumexp is -1e9 plus the logarithm of the number of keys. Float32 rounds the logarithm away, and
with it the weights by which parts of a row are merged, and all gradients. So where there is a bias:

* logsumexps are kept in float64;
* numbers below -2**30, down to float32's lowest, are counted in float32's own steps (``stepped``);
* tiles with such rows go to the kernel that gives a logsumexp with these digits.

Shapes: B batch, H query heads, Q local queries, K keys.
"""

from __future__ import annotations

import math

import torch

__all__ = [
    "INEXACT",
    "digits",
    "hides_rows",
    "imprecision",
    "is_deep",
    "logsumexp_dtype",
    "stepped",
]

Tensor = torch.Tensor
INEXACT = 1e-4
"""Relative error of a row's weights that is too much."""
FLOOR, STEP = -(2.0**30), 32.0
"""Two float32 numbers below FLOOR are 64 or more apart: to a softmax as far as STEP."""


def logsumexp_dtype(dtype: torch.dtype, *, has_bias: bool) -> torch.dtype:
    """What the logsumexps of queries of a dtype are kept in."""
    return torch.float64 if has_bias or dtype == torch.float64 else torch.float32


def stepped(x: Tensor) -> Tensor:
    """x in float64; float32 numbers below FLOOR by how many of them lie between, STEP for each.

    The order is kept, equal numbers stay equal, and no digit of a logarithm added is lost.
    """
    if x.dtype != torch.float32:
        return x.to(torch.float64)
    bits = x.contiguous().view(torch.int32)
    steps = bits - torch.full((), FLOOR).view(torch.int32).item()
    far = (x < FLOOR) & (x != -math.inf)
    return torch.where(far, FLOOR - STEP * steps, x.to(torch.float64))


def imprecision(lse_BHQ: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, H, Q]: by how much rounding to a dtype changes the weights of a row."""
    return lse_BHQ.masked_fill(lse_BHQ == -math.inf, 0.0).abs() * torch.finfo(dtype).eps


def is_deep(lse_BHQ: Tensor, dtype: torch.dtype) -> bool:
    """Whether a dtype has too few digits for logsumexps."""
    return lse_BHQ.dtype != dtype and bool((imprecision(lse_BHQ, dtype) > INEXACT).any())


def hides_rows(bias_BHQK: Tensor | None) -> bool:
    """Whether a tile's bias hides all keys of a row without being -inf."""
    if bias_BHQK is None:
        return False
    return bool((imprecision(bias_BHQK.amax(-1), bias_BHQK.dtype) > INEXACT).any())


def digits(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x as a sum of numbers of a dtype, the largest first: itself, or two of half its digits."""
    high = x.to(dtype)
    if x.dtype == dtype:
        return (high,)
    return high, (x - high).masked_fill_(high.isinf(), 0.0).to(dtype)
