"""Measure every strategy at some attentions, to be read beside what was predicted.

All ranks run forward and backward together, strategies in turn within each round, so that whatever
disturbs the machine disturbs all alike. The slowest rank's time counts.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ringfx.comm.process_group import Ranks
from ringfx.cost_model.calibration.measure import spread, synchronise, timed_once
from ringfx.cost_model.calibration.on_ranks import Progress, on_ranks
from ringfx.cost_model.choice.candidates import candidates
from ringfx.cost_model.prediction.predict import Prediction
from ringfx.cost_model.prediction.profile import Profile
from ringfx.cost_model.prediction.profile_rows import Direction
from ringfx.cost_model.prediction.rank_share import local_share
from ringfx.ir import tiles
from ringfx.ir.attention_spec import AttentionSpec
from ringfx.ir.values import AttentionSite
from ringfx.ops.operator import attention
from ringfx.strategies import STRATEGIES

__all__ = [
    "BenchTask",
    "Sample",
    "Timing",
    "admitted",
    "bench",
    "bench_site",
    "measure",
    "regret",
    "tensors_of",
    "timing",
]


@dataclass(frozen=True, kw_only=True)
class BenchTask:
    """One attention and the strategies that can run it."""

    site: AttentionSite
    strategies: tuple[str, ...]
    rounds: int = 7
    kernels: tuple[str, ...] = ()
    """For each strategy what it is predicted to run with; none: no one has chosen."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Times of one thing, measured again and again."""

    median_ms: float
    spread: float
    """Half the interquartile range over the median."""
    again: float
    """A/A: by how much every other round differs from the rounds between, as a share."""

    @staticmethod
    def of(times_ms: Sequence[float]) -> Sample:
        halves = [statistics.median(times_ms[i::2] or times_ms) for i in (0, 1)]
        return Sample(
            median_ms=statistics.median(times_ms),
            spread=spread(times_ms),
            again=max(halves) / min(halves) - 1,
        )


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What one strategy was predicted to take and took, on the slowest rank."""

    prediction: Prediction
    forward: Sample
    backward: Sample | None = None
    """None where nothing trains."""

    @property
    def samples(self) -> tuple[Sample, ...]:
        return (self.forward,) if self.backward is None else (self.forward, self.backward)

    @property
    def median_ms(self) -> float:
        return sum(sample.median_ms for sample in self.samples)

    @property
    def noise(self) -> float:
        """The larger of spread and A/A, of the direction where it is larger."""
        return max(max(sample.spread, sample.again) for sample in self.samples)

    @property
    def error(self) -> float:
        """Predicted over measured, less one."""
        return self.prediction.total_ms / self.median_ms - 1


def bench_site(
    *,
    tokens: int,
    heads: int,
    kv_heads: int | None = None,
    head_dim: int = 64,
    batch: int = 1,
    dtype: str = "float32",
    causal: bool = True,
    window: int | None = None,
    train: bool = True,
    device: str = "cpu",
) -> AttentionSite:
    """An attention to be measured, without a model around it."""
    band = None
    if window is not None:
        band = ("gt", tiles.K, ("sub", tiles.Q, ("const", window)))
    keep = tiles.conjunction(tiles.CAUSAL if causal else None, band)
    return AttentionSite(
        node="bench",
        name="bench",
        source="command line",
        found_by="bench",
        spec=AttentionSpec(scale=head_dim**-0.5, q_len=tokens, kv_len=tokens, keep=keep),
        mask_words=tiles.describe(keep),
        density=tiles.density(keep, tokens, tokens),
        balanced=tiles.is_balanced(keep, tokens, tokens),
        batch=batch,
        heads=heads,
        kv_heads=kv_heads or heads,
        head_dim=head_dim,
        v_head_dim=head_dim,
        dtype=dtype,
        device=device,
        trains=train,
    )


def admitted(site: AttentionSite, world_size: int) -> tuple[str, ...]:
    """The strategies that can run at a site."""
    return tuple(n for n, row in STRATEGIES.items() if row.admits(site, world_size) is None)


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
    kernels = tuple(option.kernel for option in options)
    task = BenchTask(site=site, strategies=names, rounds=rounds, kernels=kernels)
    times = on_ranks(measure, task, device=site.device, num_ranks=num_ranks, progress=progress)
    if times is None:
        return None
    return tuple(timing(option, times[option.strategy]) for option in options)


def timing(prediction: Prediction, samples: Mapping[Direction, Sample]) -> Timing:
    """A prediction beside its samples."""
    return Timing(
        prediction=prediction, forward=samples["forward"], backward=samples.get("backward")
    )


def regret(timings: Sequence[Timing]) -> float:
    """Measured time of the strategy predicted fastest over the best measured; ties count as one.

    Two strategies tie where their medians differ by less than the noise of both together.
    """
    chosen = min(timings, key=lambda t: t.prediction.total_ms)
    best = min(timings, key=lambda t: t.median_ms)
    ratio = chosen.median_ms / best.median_ms
    return 1.0 if ratio < 1 + chosen.noise + best.noise else ratio


def measure(
    ranks: Ranks, device: str, progress: Progress, task: BenchTask
) -> Mapping[str, Mapping[Direction, Sample]]:
    """For each strategy a sample of each direction; all ranks call it together."""
    rounds: dict[str, list[Mapping[Direction, float]]] = {name: [] for name in task.strategies}
    tensors = tensors_of(task.site, ranks.size, device)
    named = task.kernels or [""] * len(task.strategies)
    for number in range(task.rounds + 1):
        for name, kernels in zip(task.strategies, named, strict=True):
            progress(f"round {number} of {task.rounds}: {name}", number, task.rounds + 1)
            taken_ms = _slowest(_step(ranks, task.site, name, kernels, tensors, device), device)
            if number > 0:
                rounds[name].append(taken_ms)
    return {
        name: {direction: Sample.of([row[direction] for row in rows]) for direction in rows[0]}
        for name, rows in rounds.items()
    }


def tensors_of(site: AttentionSite, world_size: int, device: str) -> list[torch.Tensor]:
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
    ranks: Ranks,
    site: AttentionSite,
    strategy: str,
    kernels: str,
    tensors: list[torch.Tensor],
    device: str,
) -> Mapping[Direction, float]:
    """Milliseconds of one forward and, where the site trains, one backward."""
    assert ranks.group is not None, "a bench has a process group"
    group = str(ranks.group.group_name) if ranks.size > 1 else ""
    layout = local_share(site, ranks.size).layout
    spec = site.spec.to_json()
    q, k, v = tensors
    made: list[torch.Tensor] = []

    def forward() -> None:
        out = attention(
            q, k, v, [], spec=spec, strategy=strategy, layout=layout, group=group, name=site.name,
            kernels=kernels,
        )  # fmt: skip
        made.append(out)

    taken_ms: dict[Direction, float] = {"forward": _together(forward, device)}
    if site.trains:
        dout = torch.ones_like(made[0])
        taken_ms["backward"] = _together(
            lambda: torch.autograd.grad(made[0], tensors, dout), device
        )
    return taken_ms


def _together(run: Callable[[], object], device: str) -> float:
    """Milliseconds of one run that all ranks start together."""
    dist.barrier()
    synchronise(device)
    return timed_once(run, device)


def _slowest(taken_ms: Mapping[Direction, float], device: str) -> Mapping[Direction, float]:
    shared = torch.tensor(list(taken_ms.values()), device=device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return dict(zip(taken_ms, shared.tolist(), strict=True))
