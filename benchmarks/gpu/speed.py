"""Stage ``speed``: TFLOP/s of every kernel, and the ring's tiles beside the fastest of them.

Causal attention counts half of the products. The ring is simulated on one device: all ranks' tiles
one after the other, merges and launches included, messages not; it shows what a ring with perfect
links reaches. ``gap`` is the share of the time in which the GPU runs no kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch._C._autograd import DeviceType

from benchmarks.attention_schedule import Ring, simulate
from benchmarks.gpu.kernels import available
from benchmarks.gpu.stage import Report, Setting, median_ms
from ringfx.ir.tiles import CAUSAL
from ringfx.ops.kernels import kernel as kernels
from ringfx.ops.kernels.kernel import Kernel, Scores

__all__ = ["run"]

RANKS = 8


def run(setting: Setting) -> Report:
    report = Report(stage="speed", setting=setting)
    fastest: dict[int, tuple[float, str]] = {}
    for name, (kernel, dtypes) in available(setting).items():
        if name == "math" or torch.bfloat16 not in dtypes:
            continue
        for head_dim in (64,) if setting.small else (64, 128):
            for tokens in (256, 512) if setting.small else (2048, 8192, 16384, 32768):
                for causal in (False, True):
                    label = f"{name}, head dim {head_dim}, {tokens} tokens"
                    row = report.tried(
                        f"{label}, {'causal' if causal else 'full'}",
                        partial(_rates, kernel, head_dim, tokens, causal, setting),
                    )
                    if causal and head_dim == 128 and row["ok"]:
                        total = row["forward_tflops"] + row["backward_tflops"]
                        fastest[tokens] = max(fastest.get(tokens, (0.0, "")), (total, name))
    for tokens, (_, name) in fastest.items():
        report.add({"name": f"fastest at {tokens} tokens, causal", "kernel": name})
    for name, (kernel, dtypes) in available(setting).items():
        if name == "math" or torch.bfloat16 not in dtypes:
            continue
        for tokens in (64,) if setting.small else (8192, 16384, 32768, 65536):
            report.tried(
                f"ring of {RANKS} in turn, {name}, {tokens} tokens a rank",
                partial(_ring, kernel, tokens, setting),
            )
    return report


def _tensors(tokens: int, heads: int, head_dim: int, setting: Setting) -> list[torch.Tensor]:
    shape = (1, heads, tokens, head_dim)
    return [torch.randn(shape, device=setting.device, dtype=torch.bfloat16) for _ in range(4)]


def _rates(
    kernel: Kernel, head_dim: int, tokens: int, causal: bool, setting: Setting
) -> dict[str, Any]:
    heads = 2 if setting.small else 16
    q, k, v, dout = _tensors(tokens, heads, head_dim, setting)
    scores = Scores(scale=head_dim**-0.5, causal=causal)
    out, lse = kernel.forward(q, k, v, scores)
    out = out.to(q.dtype)
    repeats = 3 if setting.small else 10
    forward, spread = median_ms(lambda: kernel.forward(q, k, v, scores), setting.device, repeats)
    backward, again = median_ms(
        lambda: kernel.backward(dout, q, k, v, out, lse, scores), setting.device, repeats
    )
    flops = 4 * heads * tokens**2 * head_dim * (0.5 if causal else 1)
    return {
        "forward_ms": forward,
        "backward_ms": backward,
        "forward_tflops": flops / forward / 1e9,
        "backward_tflops": 2.5 * flops / backward / 1e9,
        "spread": max(spread, again),
    }


def _ring(kernel: Kernel, tokens: int, setting: Setting) -> dict[str, Any]:
    """Shares of one call of the same kernel over the whole sequence."""
    heads, head_dim = (2, 64) if setting.small else (8, 128)
    q, k, v, dout = _tensors(tokens * RANKS, heads, head_dim, setting)
    scores = Scores(scale=head_dim**-0.5, causal=True)
    ring = Ring(size=RANKS, keep=CAUSAL)

    def whole(wanted: torch.Tensor | None) -> None:
        out, lse = kernel.forward(q, k, v, scores)
        if wanted is not None:
            kernel.backward(wanted, q, k, v, out.to(q.dtype), lse, scores)

    repeats = 2 if setting.small else 5
    found: dict[str, Any] = {}
    with mock.patch.object(kernels, "choose", return_value=kernel):
        for what, wanted in (("forward", None), ("forward+backward", dout)):
            work = partial(simulate, ring, q, k, v, wanted)
            one, _ = median_ms(partial(whole, wanted), setting.device, repeats)
            tiled, spread = median_ms(work, setting.device, repeats)
            found[f"{what} percent"] = round(100 * one / tiled, 1)
            found[f"{what} spread"] = spread
            if setting.is_cuda:
                found[f"{what} gap"] = _gap(work)
    return found


def _gap(work: Callable[[], object]) -> float:
    """The share of the time between first and last kernel in which none runs."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        work()
        torch.cuda.synchronize()
    spans = sorted(
        (e.time_range.start, e.time_range.end)
        for e in profile.events() or ()
        if e.device_type == DeviceType.CUDA
    )
    if not spans:
        raise RuntimeError("the profiler saw no kernel: the gap is not known")
    busy, until = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return float(round(1 - busy / (until - spans[0][0]), 4))
