"""Time what runs outside attention on one rank: matrix products, and operators that move bytes."""

from __future__ import annotations

import itertools
import math
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ringfx.cost_model.calibration.least_squares import Matrix, fit_nonnegative
from ringfx.cost_model.calibration.measure import Effort, software, timed
from ringfx.cost_model.prediction.operators import LARGE
from ringfx.cost_model.prediction.profile_rows import Direction, ProductRow
from ringfx.torch_compat.dynamo import BackendCompilerFailed

__all__ = [
    "DIRECTIONS", "OperatorRates", "fresh_ns_per_byte", "operator_rates", "product_dtypes",
    "product_row",
]  # fmt: skip

SIZES = (
    # tokens, features before and after: as attention's projections, MLPs and vocabularies have
    (64, 128, 128), (256, 128, 384), (512, 256, 256), (1024, 256, 1024), (1024, 1024, 256),
    (2048, 512, 512), (2048, 512, 1536), (2048, 1536, 512), (1024, 1024, 4096), (256, 512, 16384),
    (4096, 128, 512), (4096, 512, 1376),
)  # fmt: skip
LARGE_SIZES = ((8192, 4096, 4096), (8192, 4096, 14336), (8192, 14336, 4096), (2048, 4096, 128256))
"""Of a GPU, which small products do not fill."""
ELEMENTS = 2**21
"""Of an operator that is no product: a few MiB, as activations of a layer of a small model."""


@dataclass(frozen=True, kw_only=True)
class OperatorRates:
    """Rows of a profile for what runs outside attention."""

    products: tuple[ProductRow, ...]
    elementwise_gbytes_per_s: float
    elementwise_us: float
    fused_gbytes_per_s: float | None
    fresh_ns_per_byte: float
    host_gbytes_per_s: float | None
    """Of pinned memory, the slower direction; None: the device is the host."""
    device_gbytes: float | None
    host_gbytes: float | None
    """Of all ranks of a machine together."""


def product_dtypes(device: str) -> Sequence[str]:
    return ("float32", "bfloat16") if device == "cpu" else ("float32", "bfloat16", "float16")


def operator_rates(
    products: Sequence[ProductRow], fresh: float, device: str, effort: Effort
) -> OperatorRates:
    """All rates, with rows of products and the price of new memory, which are measured already."""
    speed, each_us = _elementwise(device, effort)
    return OperatorRates(
        products=tuple(products),
        elementwise_gbytes_per_s=round(speed, 3),
        elementwise_us=round(each_us, 2),
        fused_gbytes_per_s=_fused_gbytes_per_s(device, effort),
        fresh_ns_per_byte=round(fresh, 4),
        host_gbytes_per_s=None if device == "cpu" else round(_host_gbytes_per_s(device, effort), 3),
        device_gbytes=None if device == "cpu" else _device_gbytes(),
        host_gbytes=None if device == "cpu" else round(HOST_SHARE * _host_gbytes(), 1),
    )


def product_row(device: str, dtype: str, direction: Direction, effort: Effort) -> ProductRow:
    """A start, a rate and a price of bytes, over all sizes."""
    cases = [*_cases(device, dtype, direction, effort)]
    features = np.array([(1.0, flops, moved) for flops, moved, _ in cases])
    seconds = np.array([statistics.median(timed(run, device, effort)) / 1e3 for *_, run in cases])
    start, rate, byte = _fitted(features, seconds)
    return ProductRow(
        dtype=dtype, direction=direction, call_us=round(start * 1e6, 2),
        gflops=round(1 / max(rate * 1e9, 1e-9), 1), ns_per_byte=round(byte * 1e9, 5),
        origin=f"{len(cases)} products, {software()}",
    )  # fmt: skip


def _fitted(features: Matrix, seconds: Matrix) -> tuple[float, float, float]:
    start, rate, byte = fit_nonnegative(features, seconds).constants.tolist()
    return start, rate, byte


def _cases(
    device: str, dtype: str, direction: Direction, effort: Effort
) -> Iterator[tuple[float, float, Callable[[], object]]]:
    """Operations, bytes, and the call; backward: on average over both gradients."""
    sizes = [size for size in SIZES if size[0] <= effort.operator_tokens]
    sizes += LARGE_SIZES if device != "cpu" else ()
    torch_dtype: torch.dtype = getattr(torch, dtype)
    for tokens, before, after in sizes:
        shapes = [(tokens, before), (after, before), (tokens, after)]
        made = _cold(shapes, torch_dtype, device)
        flops = 2.0 * tokens * before * after
        moved = sum(math.prod(shape) for shape in shapes) * torch_dtype.itemsize
        if direction == "forward":
            yield flops, moved, _forward(made)
        else:
            yield 2 * flops, 2 * moved, _backward(made)


COLD_BYTES = 128 << 20
"""More than caches hold: what a step reads was written, or last read, long before."""


def _cold(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: str
) -> Iterator[list[Tensor]]:
    """Tensors of these shapes, again and again, none of which was touched lately."""
    size = sum(math.prod(shape) for shape in shapes) * dtype.itemsize
    count = max(1, -(-COLD_BYTES // size))
    made = [[torch.randn(s, dtype=dtype, device=device) for s in shapes] for _ in range(count)]
    return itertools.cycle(made)


def _forward(made: Iterator[list[Tensor]]) -> Callable[[], object]:
    def run() -> object:
        x, weight, _ = next(made)
        return F.linear(x, weight)

    return run


def _backward(made: Iterator[list[Tensor]]) -> Callable[[], object]:
    def run() -> object:
        x, weight, grad = next(made)
        return grad @ weight, grad.t() @ x

    return run


def _elementwise(device: str, effort: Effort) -> tuple[float, float]:
    """GB/s over some operators that models are made of, and microseconds of the smallest call."""
    made = _cold([(ELEMENTS // 512, 512)] * 2, torch.float32, device)
    small = torch.zeros(8, device=device)
    num_bytes = 4 * ELEMENTS
    runs: Sequence[tuple[int, Callable[[], object]]] = (
        # bytes that are read and written
        (3 * num_bytes, lambda: torch.add(*next(made))),
        (3 * num_bytes, lambda: torch.mul(*next(made))),
        (2 * num_bytes, lambda: F.silu(next(made)[0])),
        (2 * num_bytes, lambda: F.layer_norm(next(made)[0], (512,))),
    )
    took_ms = sum(statistics.median(timed(run, device, effort)) for _, run in runs)
    each_ms = statistics.median(timed(lambda: small + small, device, effort))
    return sum(size for size, _ in runs) / took_ms / 1e6, 1e3 * each_ms


def _fused_gbytes_per_s(device: str, effort: Effort) -> float | None:
    """GB/s of what Inductor makes of a norm, a gated activation and a softmax, with gradients; None
    where it cannot compile."""
    x = torch.randn(ELEMENTS // 512, 512, device=device, requires_grad=True)
    y = torch.randn(ELEMENTS // 512, 512, device=device, requires_grad=True)
    given = torch.randn(ELEMENTS // 512, 512, device=device)
    made = torch.compile(_fused_sample, dynamic=False, fullgraph=True)

    def run() -> None:
        normed, gated, shares = made(x, y)
        torch.autograd.grad([normed, gated, shares], [x, y], [given, given, given])

    try:
        took_ms = statistics.median(timed(run, device, effort))
    except BackendCompilerFailed:
        return None
    # Forward two reads and three writes; backward three gradients and two operands read, two
    # gradients written.
    return round(12 * 4 * ELEMENTS / took_ms / 1e6, 3)


def _fused_sample(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    normed = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    return normed, F.silu(x) * y, y.softmax(-1)


def fresh_ns_per_byte(device: str, effort: Effort) -> float:
    """Writing a large new tensor, beyond writing it again: nothing where memory is kept for it."""
    if device != "cpu":
        return 0.0
    elements = 2 * LARGE // 4
    known = torch.empty(elements)
    runs = (lambda: torch.empty(elements).fill_(1.0), lambda: known.fill_(1.0))
    first, again = (statistics.median(timed(run, "cpu", effort)) for run in runs)
    return max(0.0, first - again) * 1e6 / (2 * LARGE)


HOST_BYTES = 256 << 20
HOST_SHARE = 0.75
"""Of the machine's memory, what may hold values of a device."""


def _host_gbytes_per_s(device: str, effort: Effort) -> float:
    """What a large tensor takes to pinned memory, or from there: the slower of both."""
    here = torch.zeros(HOST_BYTES // 4, device=device)
    there = torch.zeros(HOST_BYTES // 4, pin_memory=True)
    runs: Sequence[Callable[[], object]] = (
        lambda: there.copy_(here, non_blocking=True),
        lambda: here.copy_(there, non_blocking=True),
    )
    return min(HOST_BYTES / statistics.median(timed(run, device, effort)) / 1e6 for run in runs)


def _device_gbytes() -> float:
    return float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 1e9)


def _host_gbytes() -> float:
    """The machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9


DIRECTIONS: Sequence[Direction] = get_args(Direction)
