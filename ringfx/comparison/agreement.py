"""When split results count as equal: the one rule, for the loss, every output and every gradient.

A tensor t agrees with the stock model's t*, run in the same type, if

    max|t - t*|  <=  tolerance * max(max|t*|, floor)                                   (plain)

with tolerance 1e-4 (float32) or 1e-10 (float64), and for gradients floor = 1e-4 G, where G is the
largest gradient of any parameter. Where it does not, t may still be as good as t* is: both are
compared with the *exact* t', the stock model in float64 in which every request for float32 is
answered in float64 (Hugging Face computes norms, softmax and losses in float32 in any type).

    max|t - t'|  <=  2 r + tolerance * floor,    r = max(max|t* - t'|, u max|t'|)      (rounding)
    r            <=  1e-5 G  (gradients),  1e-5 max|t'|  (others)

where u is the unit of the type that t* has, as Hugging Face gives it: a single number, such as a
loss in float32, may be nearer to the exact one by luck than its type can be relied on for.

For gradients r is the largest of all parameters: no gradient of the split model is further
from exact than the unsplit model's worst is, in absolute terms. So what is only rounding there,
such as the gradient of a key's bias, which is zero in theory, may be rounding of the same size here
(a single small tensor is a poor sample of it, and a fused kernel rounds other sums than a
spelled-out one). The second line keeps this from excusing anything else: where the unsplit model
itself is far from exact, a token went to another expert.

Under autocast to bfloat16 results are held against the exact ones alone, by their 2-norm:

    |t - t'|  <=  2 r + 2^-9 |t'|                                                      (autocast)

where r is |t* - t'|, for gradients the largest of all parameters' as above; 2^-9 is half the
distance of two numbers of bfloat16, and twice that for a single number.

A gradient that only one side has, another shape, and NaN agree with nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ringfx.torch_compat.autograd import backward_in

__all__ = [
    "TOLERANCE", "Exact", "Results", "disagreements", "excesses", "excused", "none_for_zeros",
]  # fmt: skip

TOLERANCE: Mapping[str, float] = {"float32": 1e-4, "float64": 1e-10, "autocast": 1.0}
ROUNDING = 2**-9
GRADIENT_FLOOR = 1e-4
BACKWARD = (torch.Tensor.backward, torch.autograd.backward, torch.autograd.grad)
LARGEST_ROUNDING = 1e-5
"""Some hundred units in the last place of float32; a token at another expert is off by far more."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Results:
    """What one run gave, by name; gradients are named ``gradient of ...``."""

    tensors: Mapping[str, torch.Tensor | None]
    units: Mapping[str, float] = field(default_factory=dict)
    """The unit of the type that a tensor came in, where it is a floating one."""

    @property
    def largest_gradient(self) -> float:
        found = (t for name, t in self.tensors.items() if _is_gradient(name) and t is not None)
        return max(map(_magnitude, found), default=0.0)


class Exact(TorchFunctionMode):
    """Float64 wherever a program asks for float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.rand, torch.randn) and "dtype" not in (kwargs or {}):
            # The numbers that the stock model draws: the generator gives others in float64.
            return func(*args, **(kwargs or {}), dtype=torch.float32).double()
        given = {k: _wide(v) for k, v in (kwargs or {}).items()}
        if func in BACKWARD:  # the mode is off in here, where checkpoints compute again
            with backward_in(self):
                return func(*args, **(kwargs or {}))
        if func is torch.Tensor.float:
            return args[0].double()
        return func(*map(_wide, args), **given)


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def none_for_zeros(ours: Results, stock: Results) -> Results:
    """A parameter that leads to an unused result has no gradient in eager mode, and zeros in what
    AOTAutograd compiled, with or without ringfx."""
    kept = {
        name: None if x is not None and stock.tensors.get(name) is None and not x.any() else x
        for name, x in ours.tensors.items()
    }
    return replace(ours, tensors=kept)


def disagreements(ours: Results, stock: Results) -> dict[str, float]:
    """For each tensor max|t - t*| / max(max|t*|, floor); infinite where nothing is comparable."""
    names = stock.tensors.keys() | ours.tensors.keys()
    floor = GRADIENT_FLOOR * stock.largest_gradient
    return {
        name: _relative(
            ours.tensors.get(name), stock.tensors.get(name), floor if _is_gradient(name) else 0.0
        )
        for name in sorted(names)
    }


def excesses(ours: Results, stock: Results, exact: Results) -> dict[str, float]:
    """For each tensor its distance from exact, over what is allowed under autocast."""
    names = sorted(stock.tensors.keys() | ours.tensors.keys())
    return {name: _excess(name, ours, stock, exact) for name in names}


def _excess(name: str, ours: Results, stock: Results, exact: Results) -> float:
    mine, theirs, true = (r.tensors.get(name) for r in (ours, stock, exact))
    if mine is None or theirs is None or true is None:
        return 0.0 if mine is theirs else math.inf
    if not mine.shape == theirs.shape == true.shape:
        return math.inf
    chance = ROUNDING * (2 if true.numel() == 1 else 1) * _norm(_finite(true))
    rounding = max(_norm(_difference(*pair)) for pair in _of_kind(name, stock, exact))
    allowed = 2 * rounding + chance
    found = _norm(_difference(mine, true))
    return math.inf if math.isnan(found) else found / allowed if allowed else float(found > 0)


def _difference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Infinities on both sides agree."""
    return torch.where(a == b, 0.0, a - b)


def _finite(value: torch.Tensor) -> torch.Tensor:
    return value[value.isfinite()]


def _norm(value: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(value)) if value.numel() else 0.0


def excused(
    names: Iterable[str], ours: Results, stock: Results, exact: Results, dtype: str
) -> set[str]:
    """The names whose difference from the stock model is no more than rounding, as defined."""
    ordered = sorted(names)  # reading a split value moves it: all ranks read in one order
    return {name for name in ordered if _is_rounding(name, ours, stock, exact, TOLERANCE[dtype])}


def _is_rounding(
    name: str, ours: Results, stock: Results, exact: Results, tolerance: float
) -> bool:
    mine, theirs, true = (r.tensors.get(name) for r in (ours, stock, exact))
    if mine is None or theirs is None or true is None or mine.shape != theirs.shape:
        return False
    largest = exact.largest_gradient
    scale = largest if _is_gradient(name) else _magnitude(true)
    bound = LARGEST_ROUNDING * scale
    rounding = max(_distance(*pair) for pair in _of_kind(name, stock, exact))
    rounding = max(rounding, stock.units.get(name, 0.0) * _magnitude(true))
    floor = tolerance * GRADIENT_FLOOR * scale
    return rounding <= bound and _distance(mine, true) <= 2 * rounding + floor


def _of_kind(
    name: str, stock: Results, exact: Results
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The tensor from both sides; for a gradient every gradient."""
    for other, theirs in stock.tensors.items():
        true = exact.tensors.get(other)
        alike = other == name or (_is_gradient(name) and _is_gradient(other))
        if alike and theirs is not None and true is not None:
            yield theirs, true


def _is_gradient(name: str) -> bool:
    return name.startswith("gradient of ")


def _relative(ours: torch.Tensor | None, stock: torch.Tensor | None, floor: float) -> float:
    if ours is None or stock is None:
        return 0.0 if ours is stock else math.inf
    distance = _distance(ours, stock)
    if distance == 0.0:
        return 0.0
    scale = max(_magnitude(stock), floor)
    return distance / scale if scale > 0.0 else math.inf


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """max|a - b|; infinities on both sides agree; infinite for NaN or another shape."""
    if a.shape != b.shape:
        return math.inf
    if not a.numel():
        return 0.0
    found = float(torch.where(a == b, 0.0, a - b).abs().max())
    return math.inf if math.isnan(found) else found


def _magnitude(value: torch.Tensor) -> float:
    finite = value[value.isfinite()] if value.isinf().any() else value
    return float(finite.abs().max()) if finite.numel() else 0.0
