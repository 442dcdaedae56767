"""Stage ``kernels``: every kernel against float64, forward and backward.

For each kernel that this device has: element types, head dims, grouped heads, causal and masked
tiles. The bound is a few roundings of the type for whole tensors in the 2-norm.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.stage import Report, Setting, relative_error
from ringfx.ops.kernels import kernel as kernels
from ringfx.ops.kernels.dropout import kept, key_numbers, row_numbers
from ringfx.ops.kernels.kernel import MATH, Kernel, Scores

__all__ = ["available", "run"]

BOUNDS = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 2e-4, torch.float64: 1e-12}
"""Norm of the error over the norm of the result; an error of indexing is near 1."""

HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class Case:
    dtype: torch.dtype
    head_dim: int
    heads: int
    kv_heads: int
    tokens: int
    mask: str

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return (
            f"{kind}, {self.heads}/{self.kv_heads} heads of {self.head_dim}, {self.tokens} tokens,"
            f" {self.mask}"
        )


def available(setting: Setting) -> dict[str, tuple[Kernel, tuple[torch.dtype, ...]]]:
    """The kernels that this device can be asked for, and the types they take."""
    every = (*HALVES, torch.float32, torch.float64)
    device = torch.device(setting.device)
    by_type = {dtype: kernels.available(device, dtype) | {"math": MATH} for dtype in every}
    names = {name: kernel for found in by_type.values() for name, kernel in found.items()}
    return {
        name: (kernel, tuple(dtype for dtype in every if name in by_type[dtype]))
        for name, kernel in names.items()
    }


def cases(dtype: torch.dtype, small: bool) -> Iterator[Case]:
    dims = (16, 64, 80) if small else (16, 32, 64, 72, 80, 96, 128, 160, 192, 256)
    for head_dim in dims:
        for mask in ("full", "causal", "masked"):
            yield Case(dtype=dtype, head_dim=head_dim, heads=4, kv_heads=4, tokens=333, mask=mask)
    for kv_heads in (1, 2):
        yield Case(dtype=dtype, head_dim=64, heads=4, kv_heads=kv_heads, tokens=256, mask="causal")


def run(setting: Setting) -> Report:
    report = Report(stage="kernels", setting=setting)
    report.tried("what dropout drops, beside the CPU", partial(_dropped_alike, setting))
    for name, (kernel, dtypes) in available(setting).items():
        for dtype in dtypes:
            for case in cases(dtype, setting.small):
                report.tried(f"{name}, {case}", partial(_errors, kernel, case, setting))
    return report


def _dropped_alike(setting: Setting) -> dict[str, Any]:
    """Dropout's choice is integers alone, so a device makes the same one as the CPU."""
    sizes = (2, 3, 65, 130)  # batch, heads, queries, keys
    found = []
    for device in ("cpu", setting.device):
        b, h, q, k = (torch.arange(n, device=device) for n in sizes)
        seed = torch.tensor(2**61 + 7, device=device)
        rows, keys = row_numbers(seed, b, h, q), key_numbers(seed, b, h, k)
        found.append(kept(*rows, keys, 0.1).cpu())
    different = int((found[0] != found[1]).sum())
    assert different == 0, f"{different} of {found[0].numel()} weights"
    return {"dropped": 1 - float(found[0].abs().double().mean())}


def _errors(kernel: Kernel, case: Case, setting: Setting) -> dict[str, Any]:
    torch.manual_seed(case.head_dim + case.tokens)
    H, G, S, D = case.heads, case.kv_heads, case.tokens, case.head_dim
    given = [
        torch.randn(2, heads, S, D, device=setting.device, dtype=torch.float64).to(case.dtype)
        for heads in (H, G, G, H)
    ]
    scores = Scores(scale=D**-0.5, causal=case.mask == "causal", bias_BHQK=_bias(case, setting))
    exact = _all(MATH, [x.double() for x in given], scores)
    found = _all(kernel, given, scores)
    names = ("out", "dq", "dk", "dv")
    errors = {name: relative_error(a, b) for name, a, b in zip(names, found, exact, strict=True)}
    worst = max(errors.values())
    return {**errors, "ok": worst <= BOUNDS[case.dtype] and not math.isnan(worst)}


def _bias(case: Case, setting: Setting) -> torch.Tensor | None:
    if case.mask != "masked":
        return None
    rows = torch.arange(case.tokens, device=setting.device)
    hidden = (rows[:, None] + rows) % 3 == 0
    kept_in = torch.float64 if case.dtype == torch.float64 else torch.float32
    bias = torch.zeros(1, 1, case.tokens, case.tokens, dtype=kept_in, device=setting.device)
    return bias.masked_fill(hidden, -math.inf)


def _all(kernel: Kernel, given: list[torch.Tensor], scores: Scores) -> tuple[torch.Tensor, ...]:
    q, k, v, dout = given
    if q.dtype == torch.float64 and scores.bias_BHQK is not None:
        scores = Scores(
            scale=scores.scale, causal=scores.causal, bias_BHQK=scores.bias_BHQK.double()
        )
    out, lse = kernel.forward(q, k, v, scores)
    gradients = kernel.backward(dout, q, k, v, out.to(q.dtype), lse, scores)
    return out, *gradients
