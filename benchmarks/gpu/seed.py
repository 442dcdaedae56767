"""Stage ``seed``: the seed's experiment at its shapes, on this device.

One rank, one batch, 8 heads of 64, float16, forward without gradient, not causal: each strategy's
time and peak memory at 2,048 to 16,384 tokens, of dense attention and of dilated attention with the
seed's segments and rates.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks.gpu.stage import Report, Setting, median_ms
from ringfx import ops
from ringfx.errors import RingfxError
from ringfx.strategies import STRATEGIES

__all__ = ["run"]

HEADS, HEAD_DIM = 8, 64
SEGMENTS, RATES = (1024, 2048, 4096), (1, 2, 4)


def run(setting: Setting) -> Report:
    report = Report(stage="seed", setting=setting)
    for tokens in (256, 512) if setting.small else (2048, 4096, 8192, 16384):
        for strategy in STRATEGIES:
            for dilated in (False, True):
                name = f"{'dilated' if dilated else 'dense'}, {strategy}, {tokens} tokens"
                report.tried(name, partial(_measured, strategy, tokens, setting, dilated))
    return report


def _measured(strategy: str, tokens: int, setting: Setting, dilated: bool) -> dict[str, Any]:
    dtype = torch.float16
    q, k, v = (
        torch.randn(1, HEADS, tokens, HEAD_DIM, device=setting.device, dtype=dtype)
        for _ in range(3)
    )

    def work() -> torch.Tensor:
        with torch.no_grad():
            if dilated:
                return ops.dilated_attention(
                    q, k, v, segment_lengths=SEGMENTS, dilation_rates=RATES, strategy=strategy
                )
            return ops.ring_attention(q, k, v, causal=False, strategy=strategy)

    try:
        found, spread = median_ms(work, setting.device, 3 if setting.small else 10)
    except RingfxError as error:
        return {"refused": str(error)}
    row: dict[str, Any] = {"median_ms": found, "spread": spread}
    if setting.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return row
