"""Logsumexps of rows whose keys a bias hides all, with a number such as -1e9 instead of -inf.

Unsplit, the scores of such a row vanish beside the number, and all keys share the weight. The row's
logsumexp is -1e9 plus the logarithm of the number of keys. Float32 rounds the logarithm away, and
with it the weights by which parts of a row are merged, and all gradients. So where there is a bias:

* logsumexps are kept in float64;
* numbers below -2**30, down to the lowest one, are counted in steps (``stepped``);
* tiles with such rows go to the kernel that gives a logsumexp with these digits.

Shapes: B batch, H query heads, Q local queries, K keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

__all__ = [
    "digits",
    "hides_rows",
    "hides_rows_wholly",
    "is_deep",
    "logsumexp_dtype",
    "lost",
    "lost_range",
    "stepped",
]

Tensor = torch.Tensor
INEXACT = 1e-4
"""Relative error of a row's weights that is too much."""
HIDES = -4_000.0
"""What a mask fills scores with lies far below; what scores and other biases come to far above."""
STEP = 32.0
"""A step is as far to a softmax as two neighbours below a floor, which are 64 or more apart."""


@dataclass(frozen=True)
class _Steps:
    """How numbers of a type below a floor are counted: as many as differ in their upper bits."""

    bits: torch.dtype
    dropped: int
    """Lower bits that are not looked at."""
    floor: float
    absorbs: float
    """Below it a score that is added is rounded away."""

    def far(self, x: Tensor) -> Tensor:
        return (x < self.floor) & (x != -math.inf)

    def count(self, x: Tensor) -> Tensor:
        """How many steps lie between."""
        floor = int(torch.full((), self.floor, dtype=x.dtype).view(self.bits).item())
        return (x.contiguous().view(self.bits) >> self.dropped) - (floor >> self.dropped)


_STEPS = {
    torch.float32: _Steps(torch.int32, 0, floor=-(2.0**30), absorbs=-(2.0**30)),
    # All of float64's would be 2**62 steps. Masks of one strength agree in their upper bits.
    torch.float64: _Steps(torch.int64, 42, floor=-(2.0**31), absorbs=-(2.0**59)),
}


def logsumexp_dtype(dtype: torch.dtype, *, has_bias: bool) -> torch.dtype:
    """What the logsumexps of queries of a dtype are kept in."""
    return torch.float64 if has_bias or dtype == torch.float64 else torch.float32


def stepped(x: Tensor) -> Tensor:
    """x in float64; numbers below their type's floor by how many steps lie between, STEP for each.

    The order is kept, equal numbers stay equal, and no digit of a logarithm added is lost.
    """
    wide, steps = x.to(torch.float64), _STEPS.get(x.dtype)
    if steps is None:
        return wide
    return torch.where(steps.far(x), steps.floor - STEP * steps.count(x), wide)


def lost(lse_BHQ: Tensor) -> Tensor:
    """[B, H, Q]: rows of float64 hidden by a number beside which scores keep a few digits."""
    steps = _STEPS[torch.float64]
    deepest = torch.full((), steps.absorbs, dtype=torch.float64)
    return (lse_BHQ < steps.floor) & (lse_BHQ > stepped(deepest).item())


def lost_range() -> str:
    """Those numbers."""
    steps = _STEPS[torch.float64]
    return f"between {steps.floor:.1e} and {steps.absorbs:.1e}"


def _imprecision(lse_BHQ: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, H, Q]: by how much rounding to a dtype changes the weights of a row."""
    return lse_BHQ.masked_fill(lse_BHQ == -math.inf, 0.0).abs() * torch.finfo(dtype).eps


def is_deep(lse_BHQ: Tensor, dtype: torch.dtype) -> bool:
    """Whether a dtype has too few digits for logsumexps."""
    if lse_BHQ.dtype == dtype:
        return dtype in _STEPS and bool(_STEPS[dtype].far(lse_BHQ).any())
    return bool((_imprecision(lse_BHQ, dtype) > INEXACT).any())


def hides_rows(bias_BHQK: Tensor | None) -> bool:
    """Whether a tile's bias hides all keys of a row without being -inf."""
    if bias_BHQK is None:
        return False
    top_BHQ = bias_BHQK.amax(-1)
    hidden_BHQ = _imprecision(top_BHQ, bias_BHQK.dtype) > INEXACT
    if bias_BHQK.dtype in _STEPS:
        hidden_BHQ |= _STEPS[bias_BHQK.dtype].far(top_BHQ)
    return bool(hidden_BHQ.any())


def hides_rows_wholly(bias_BHQK: Tensor) -> bool:
    """Whether a tile's bias hides all keys of a row by any number, -inf apart."""
    top_BHQ = bias_BHQK.amax(-1)
    return bool(((top_BHQ < HIDES) & (top_BHQ != -math.inf)).any())


def digits(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x as a sum of numbers of a dtype, the largest first: itself, or two of half its digits."""
    high = x.to(dtype)
    if x.dtype == dtype:
        return (high,)
    return high, (x - high).masked_fill_(high.isinf(), 0.0).to(dtype)
