"""Measure every strategy at one attention, to be read beside what was predicted.

All ranks run forward and backward together, strategies in turn within each round, so that whatever
disturbs the machine disturbs all alike. The slowest rank's time counts.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ringfx.cost_model.candidates import candidates
from ringfx.cost_model.formulas import Prediction
from ringfx.cost_model.local import local_share
from ringfx.cost_model.measure import spread, synchronise, timed_once
from ringfx.cost_model.on_ranks import Progress, on_ranks
from ringfx.cost_model.profile import Profile
from ringfx.ops.attention import attention
from ringfx.ops.ranks import Ranks
from ringfx.passes.values import AttentionSite
from ringfx.strategies import STRATEGIES

__all__ = ["BenchTask", "Timing", "bench", "regret"]


@dataclass(frozen=True, kw_only=True)
class BenchTask:
    """One attention and the strategies that can run it."""

    site: AttentionSite
    strategies: tuple[str, ...]
    rounds: int = 7


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What one strategy was predicted to take and took, on the slowest rank."""

    prediction: Prediction
    median_ms: float
    spread: float
    """Half the interquartile range over the median."""

    @property
    def error(self) -> float:
        """Predicted over measured, less one."""
        return self.prediction.total_ms / self.median_ms - 1


def bench(
    site: AttentionSite, *, num_ranks: int, profile: Profile, rounds: int, progress: Progress
) -> tuple[Timing, ...] | None:
    """Every strategy that can run, fastest prediction first; None on other ranks of torchrun.

    Raises
    ------
    CommunicationError
        A rank failed.
    """
    options = candidates(site, num_ranks, profile, STRATEGIES).options
    names = tuple(option.strategy for option in options)
    task = BenchTask(site=site, strategies=names, rounds=rounds)
    times = on_ranks(_measure, task, device=site.device, num_ranks=num_ranks, progress=progress)
    if times is None:
        return None
    return tuple(
        Timing(
            prediction=option,
            median_ms=statistics.median(times[option.strategy]),
            spread=spread(times[option.strategy]),
        )
        for option in options
    )


def regret(timings: Sequence[Timing]) -> float:
    """Measured time of the strategy predicted fastest over the best measured; ties count as one.

    Two strategies tie where their medians differ by less than their own spreads together.
    """
    chosen = min(timings, key=lambda t: t.prediction.total_ms)
    best = min(timings, key=lambda t: t.median_ms)
    ratio = chosen.median_ms / best.median_ms
    return 1.0 if ratio < 1 + chosen.spread + best.spread else ratio


def _measure(
    ranks: Ranks, device: str, progress: Progress, task: BenchTask
) -> Mapping[str, list[float]]:
    """Milliseconds of each round of each strategy, of the slowest rank."""
    tensors = _tensors(task.site, ranks.size, device)
    times: dict[str, list[float]] = {name: [] for name in task.strategies}
    for number in range(task.rounds + 1):
        for name in task.strategies:
            progress(f"round {number} of {task.rounds}: {name}", number, task.rounds + 1)
            taken_ms = _slowest(_step(ranks, task.site, name, tensors, device), device)
            if number > 0:
                times[name].append(taken_ms)
    return times


def _tensors(site: AttentionSite, world_size: int, device: str) -> list[torch.Tensor]:
    local = local_share(site, world_size)
    dtype: torch.dtype = getattr(torch, site.dtype)
    shapes = (
        (site.batch, site.heads, local.q_len, site.head_dim),
        (site.batch, site.kv_heads, local.kv_len, site.head_dim),
        (site.batch, site.kv_heads, local.kv_len, site.v_head_dim),
    )
    return [
        torch.randn(shape, dtype=dtype, device=device, requires_grad=site.trains)
        for shape in shapes
    ]


def _step(
    ranks: Ranks, site: AttentionSite, strategy: str, tensors: list[torch.Tensor], device: str
) -> float:
    """Milliseconds of one forward, and backward where the site trains."""
    assert ranks.group is not None, "a bench has a process group"
    group = str(ranks.group.group_name) if ranks.size > 1 else ""
    layout = local_share(site, ranks.size).layout
    spec = site.spec.to_json()
    q, k, v = tensors

    def run() -> None:
        out = attention(
            q, k, v, [], spec=spec, strategy=strategy, layout=layout, group=group, name=site.name
        )
        if site.trains:
            torch.autograd.grad(out, tensors, torch.ones_like(out))

    dist.barrier()
    synchronise(device)
    return timed_once(run, device)


def _slowest(taken_ms: float, device: str) -> float:
    shared = torch.tensor([taken_ms], device=device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return float(shared.item())
