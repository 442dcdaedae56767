"""Time the parts that a prediction is made of, on one rank: kernels, masks, memory.

Everything runs the code that attention runs: the kernels of ``ringfx.ops.kernels``, the masks of
``ringfx.tiles``. Each case is timed until its share of the time is spent, in an order that mixes
small and large, and its median taken; nothing that failed is recorded as a number.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ringfx.cost_model.calibration.records import AttentionRecord
from ringfx.cost_model.prediction.devices import device_name
from ringfx.cost_model.prediction.profile_rows import Direction
from ringfx.ir import tiles
from ringfx.ir.kernel_table import TABLE
from ringfx.ops.kernels.kernel import MATH, Kernel, Scores, available

__all__ = [
    "Effort",
    "KernelCase",
    "kernel_cases",
    "mask_costs",
    "masked_ns_per_pair",
    "measure_kernel",
    "memory_gbytes_per_s",
    "software",
    "spread",
    "synchronise",
    "timed_once",
]

MASK_SIDE = 512
"""Side of the tiles in which operators evaluate a mask."""
SMALL_MASK_SIDE = 8
"""Of a tile whose pairs cost nothing beside the calls."""
MASKED_SIDE = 256
"""Of the tiles in which a mask's price for a kernel is measured: their scores stay in cache."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much time a calibration may take."""

    seconds_per_case: float = 0.4
    min_repeats: int = 5
    max_tokens: int = 4096
    max_message_bytes: int = 16 * 2**20
    operator_tokens: int = 4096
    """The most of matrix products and of whole steps."""
    compiled: bool = True
    """Whole steps are timed as Inductor compiles them, too."""


@dataclass(frozen=True, kw_only=True)
class KernelCase:
    """One kernel call: as many queries as keys."""

    kernel: str
    dtype: str
    direction: Direction
    heads: int
    head_dim: int
    tokens: int


def software() -> str:
    """Versions that a time depends on."""
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads"


def kernel_cases(device: str, effort: Effort) -> tuple[KernelCase, ...]:
    """Sizes over heads, head dims and tokens; the products grow, the rest shows their starts."""
    dtypes = ("float32", "bfloat16") if device == "cpu" else ("bfloat16", "float16", "float32")
    return tuple(
        KernelCase(
            kernel=kernel,
            dtype=dtype,
            direction=direction,
            heads=heads,
            head_dim=head_dim,
            tokens=tokens,
        )
        for dtype in dtypes
        for kernel in _kernels(device, dtype)
        for direction in ("forward", "backward")
        for heads, head_dim, tokens in _sizes(kernel, effort)
    )


def _sizes(kernel: str, effort: Effort) -> Iterator[tuple[int, int, int]]:
    """Math runs in small tiles only; a fused kernel takes a whole shard."""
    largest = 512 if kernel == "math" else effort.max_tokens
    for heads, head_dim, lengths in SIZES:
        for tokens in lengths:
            if tokens <= largest and heads * tokens**2 <= 2 * largest**2:
                yield heads, head_dim, tokens


EVEN, ODD = (64, 128, 256, 512, 1024, 2048, 4096, 8192), (90, 180, 360, 720, 1440, 2880)
SIZES = ((1, 64, EVEN), (4, 128, EVEN), (8, 32, EVEN), (8, 64, EVEN), (5, 72, ODD))
"""Heads, head dim and tokens; the last row is for sizes that fill no block."""


def _kernels(device: str, dtype: str) -> dict[str, Kernel]:
    """Every kernel that layers may run with on this device, by name, and the reference."""
    return available(torch.device(device), getattr(torch, dtype)) | {MATH.name: MATH}


def measure_kernel(device: str, case: KernelCase, effort: Effort) -> AttentionRecord:
    """Median time of one kernel call, and half its interquartile range as a share of it."""
    run = _kernel_call(device, case)
    times_ms = timed(run, device, effort)
    return AttentionRecord(
        device=device_name(device) or device,
        software=software(),
        dtype=case.dtype,
        strategy="",
        kernel=case.kernel,
        batch=1,
        heads=case.heads,
        kv_heads=case.heads,
        head_dim=case.head_dim,
        v_head_dim=case.head_dim,
        q_len=case.tokens,
        kv_len=case.tokens,
        mask="none",
        density=1.0,
        world_size=1,
        direction=case.direction,
        median_ms=statistics.median(times_ms),
        spread=spread(times_ms),
    )


def _kernel_call(
    device: str, case: KernelCase, bias: torch.Tensor | None = None
) -> Callable[[], object]:
    kernel = _kernels(device, case.dtype)[case.kernel]
    shape = (1, case.heads, case.tokens, case.head_dim)
    dtype: torch.dtype = getattr(torch, case.dtype)
    q, k, v, dout = (torch.randn(shape, dtype=dtype, device=device) for _ in range(4))
    scores = Scores(scale=case.head_dim**-0.5, bias_BHQK=bias)
    if case.direction == "forward":
        return lambda: kernel.forward(q, k, v, scores)
    out, lse = kernel.forward(q, k, v, scores)
    return lambda: kernel.backward(dout, q, k, v, out.to(dtype), lse, scores)


def timed(run: Callable[[], object], device: str, effort: Effort) -> list[float]:
    """Milliseconds of each repetition after a warm-up."""
    timed_once(run, device)
    times_ms: list[float] = []
    start = time.perf_counter()
    while (
        len(times_ms) < effort.min_repeats or time.perf_counter() - start < effort.seconds_per_case
    ):
        times_ms.append(timed_once(run, device))
    return times_ms


def timed_once(run: Callable[[], object], device: str) -> float:
    """Milliseconds of one run, the device waited for before and after."""
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return 1e3 * (time.perf_counter() - start)


def synchronise(device: str) -> None:
    """Wait for the device, where calls return before they are done."""
    if device == "cuda":
        torch.cuda.synchronize()


def spread(times: Sequence[float]) -> float:
    """Half the interquartile range over the median."""
    if len(times) < 4:
        return 0.0
    low, middle, high = statistics.quantiles(times, n=4)
    return (high - low) / 2 / middle


def mask_costs(device: str, effort: Effort) -> tuple[float, float]:
    """Evaluating a causal window and writing it out: microseconds a tile, nanoseconds a pair."""
    small, large = (_mask_ms(device, side, effort) for side in (SMALL_MASK_SIDE, MASK_SIDE))
    ns_per_pair = 1e6 * max(0.0, large - small) / (MASK_SIDE**2 - SMALL_MASK_SIDE**2)
    return 1e3 * small, ns_per_pair


def _mask_ms(device: str, side: int, effort: Effort) -> float:
    span = torch.arange(side, device=device)
    one = torch.zeros(1, dtype=torch.int64, device=device)
    index = tiles.TileIndex(b=one, h=one, q=span + side, k=span)
    window = ("gt", tiles.K, ("sub", tiles.Q, ("const", side)))
    keep = tiles.conjunction(tiles.CAUSAL, window)
    assert keep is not None
    zero = torch.zeros(1, 1, 1, 1, device=device)

    def run() -> torch.Tensor:
        kept = tiles.evaluate(keep, index, []).to(torch.bool)
        return torch.where(kept, zero, -torch.inf).contiguous()

    return statistics.median(timed(run, device, effort))


def masked_ns_per_pair(
    device: str, kernel_name: str, direction: Direction, effort: Effort
) -> float:
    """What a kernel takes longer for a pair where it is given a mask that hides half of the pairs.

    Hidden ones cost more than others: the exponential of minus infinity is slow on a CPU. A kernel
    that takes no mask is given none.
    """
    if not TABLE[kernel_name].masks:
        return 0.0
    case = KernelCase(
        kernel=kernel_name,
        dtype="float32",
        direction=direction,
        heads=4,
        head_dim=64,
        tokens=MASKED_SIDE,
    )
    causal = torch.full((1, 1, MASKED_SIDE, MASKED_SIDE), -torch.inf, device=device).triu_(1)
    runs = [_kernel_call(device, case, bias) for bias in (causal, None)]
    with_mask, without = (statistics.median(timed(run, device, effort)) for run in runs)
    return 1e6 * max(0.0, with_mask - without) / (case.heads * MASKED_SIDE**2)


def memory_gbytes_per_s(device: str, effort: Effort, num_bytes: int = 64 * 2**20) -> float:
    """Adding one array to another: two reads and a write."""
    a, b = (torch.ones(num_bytes // 4, device=device) for _ in range(2))
    seconds = statistics.median(timed(lambda: a.add_(b), device, effort)) / 1e3
    return 3 * num_bytes / seconds / 1e9
