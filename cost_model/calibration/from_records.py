"""A profile's rows from records: the same code for a laptop's calibration and a printed table."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from ringfx.cost_model.calibration.least_squares import Fit, Matrix, fit_nonnegative, leave_one_out
from ringfx.cost_model.calibration.records import AttentionRecord, MessageRecord
from ringfx.cost_model.prediction.profile import Profile
from ringfx.cost_model.prediction.profile_rows import (
    Direction,
    KernelRow,
    LinkRow,
    MemoryRow,
    Scope,
)
from ringfx.cost_model.prediction.terms import message_steps
from ringfx.errors import ProfileError
from ringfx.ops.tiling.flops import flops_per_pair

__all__ = ["Quality", "fit_kernels", "fit_links", "fit_memory", "observed_profile"]

FEW_SIZES = 4
"""With fewer sizes than this just one scale is fitted: more terms would fit the noise."""

SMALLEST = 1e-9
"""Seconds a Gflop or a GB below which a term is none: no machine is that fast."""

K = TypeVar("K")
R = TypeVar("R", AttentionRecord, MessageRecord)


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How well rows fit their records, as relative errors."""

    what: str
    num_records: int
    median_error: float
    leave_one_out: float | None

    def words(self) -> str:
        """Such as ``kernels: median error 3% over 40 records, 4% left out``."""
        left_out = "" if self.leave_one_out is None else f", {self.leave_one_out:.0%} left out"
        error = (
            f"{self.median_error:.1%}" if self.median_error < 0.02 else f"{self.median_error:.0%}"
        )
        return f"{self.what}: median error {error} over {self.num_records} records{left_out}"


def observed_profile(
    records: Sequence[AttentionRecord], *, name: str, device: str, origin: str
) -> Profile:
    """A profile of whole strategies of other code on one rank, from its published table."""
    kernels, time_quality = fit_kernels(records)
    memory, memory_quality = fit_memory(records)
    names = {record.device for record in records}
    if len(names) != 1:
        raise ProfileError(
            f"records of {len(names)} devices ({', '.join(sorted(names)[:4])}) cannot make one "
            "profile. Do: give the records of one device."
        )
    suspects = [r for r in records if r.suspect_peak]
    return Profile(
        name=name,
        device=device,
        device_name=names.pop(),
        kind="observed",
        origin=origin,
        ranks_per_node=1,
        memory_gbytes_per_s=None,
        memory_origin="not in the records",
        fused_kernel="none",
        kernels=kernels,
        links=(),
        memory=memory,
        noise=_rounded(1 + statistics.median([r.spread for r in records if r.spread] or [0.0])),
        quality=f"{time_quality.words()}; {memory_quality.words()}",
        notes=tuple(
            f"left out: {r.strategy} at {r.q_len} tokens, {r.suspect_peak}" for r in suspects
        ),
    )


def fit_kernels(records: Sequence[AttentionRecord]) -> tuple[tuple[KernelRow, ...], Quality]:
    """Time of each (kernel, dtype, direction) as a start and a rate; one rank only."""
    timed = [r for r in records if r.median_ms is not None and r.world_size == 1 and r.kernel]
    groups = _grouped(timed, lambda r: (r.kernel, r.dtype, r.direction))
    rows, fits, left_out = [], [], []
    for (kernel, dtype, direction), members in groups.items():
        features = np.array([_kernel_features(r) for r in members])
        if len({r.pairs for r in members}) < FEW_SIZES:
            features[:, [0, 2]] = 0
        seconds = np.array([_ms(r) / 1e3 for r in members])
        fit = fit_nonnegative(features, seconds)
        fits.append(fit)
        left_out.append(leave_one_out(features, seconds))
        rows.append(_kernel_row(kernel, dtype, direction, fit, _origins(members)))
    return tuple(rows), _quality("kernel times", fits, left_out)


def _ms(record: AttentionRecord) -> float:
    assert record.median_ms is not None, record
    return record.median_ms


def _kernel_features(record: AttentionRecord) -> list[float]:
    """Multiples of: one microsecond a call, one second a Gflop, one nanosecond a pair."""
    flops = flops_per_pair(record.head_dim, record.v_head_dim, record.direction) * record.pairs
    return [1e-6, flops / 1e9, record.pairs / 1e9]


def _kernel_row(kernel: str, dtype: str, direction: Direction, fit: Fit, origin: str) -> KernelRow:
    call_us, seconds_per_gflop, ns_per_pair = (float(x) for x in fit.constants)
    return KernelRow(
        kernel=kernel,
        dtype=dtype,
        direction=direction,
        call_us=_rounded(call_us),
        gflops=_rounded(1 / max(seconds_per_gflop, SMALLEST)),
        ns_per_pair=_rounded(ns_per_pair),
        origin=f"{origin}; fitted to {len(fit.errors)} sizes, median error {fit.median_error:.0%}",
    )


def fit_links(
    records: Sequence[MessageRecord], scope_of: Mapping[str, Scope]
) -> tuple[tuple[LinkRow, ...], Quality]:
    """Latency and bandwidth of each collective over each link.

    The latency is the fastest small message's, a step: medians of small ones hold the scheduler's
    ticks, which a layer has once and not with every message (``layers``). The bandwidth is fitted
    to the medians of large messages: small ones may pass a link faster than it lets many pass.

    Parameters
    ----------
    scope_of
        Whether a link's name means one node or the network.
    """
    strange = sorted({r.link for r in records} - set(scope_of))
    if strange:
        raise ProfileError(
            f"fit_links: nobody says whether the link {strange[0]!r} is one node. Do: pass "
            f'scope_of={{{strange[0]!r}: "node"}}, or "network".'
        )
    groups = _grouped(records, lambda r: (r.operation, scope_of[r.link]))
    rows, fits, left_out = [], [], []
    for (operation, scope), members in groups.items():
        latency_s = min(r.min_ms / 1e3 / message_steps(r.operation, r.world_size) for r in members)
        large = [r for r in members if r.bytes >= LARGE_MESSAGE] or members
        steps = [message_steps(r.operation, r.world_size) for r in large]
        taken_s = [r.median_ms / 1e3 - n * latency_s for r, n in zip(large, steps, strict=True)]
        seconds = np.maximum(np.array(taken_s), SHORTEST)
        features = np.array([[r.bytes / 1e9] for r in large])
        fit = fit_nonnegative(features, seconds)
        fits.append(fit)
        left_out.append(leave_one_out(features, seconds))
        rows.append(
            LinkRow(
                operation=operation,
                scope=scope,
                latency_us=_rounded(1e6 * latency_s),
                gbytes_per_s=_rounded(1 / max(float(fit.constants[0]), SMALLEST)),
                origin=f"{_origins(members)}; median error {fit.median_error:.0%}",
            )
        )
    return tuple(rows), _quality("messages", fits, left_out)


LARGE_MESSAGE = 2**17
"""Bytes from which a message is mostly transfer."""

SHORTEST = 1e-7
"""Seconds: a median below the latency is noise."""


def fit_memory(records: Sequence[AttentionRecord]) -> tuple[tuple[MemoryRow, ...], Quality]:
    """Peak bytes of each strategy: one base for all, tensors and scores of each.

    A record that ran out of memory says that its capacity is too little; suspect peaks are left
    out. The base is what the device's libraries hold, whichever strategy runs.
    """
    used = [r for r in records if _has_peak(r) or r.out_of_memory]
    if not used:
        return (), _quality("memory", [], [])
    names = list(dict.fromkeys(r.strategy for r in used))
    features = np.array([_memory_features(r, names) for r in used])
    bytes_seen = np.array([float(r.capacity_bytes or r.peak_bytes or 0) for r in used])
    fit = fit_nonnegative(features, bytes_seen, np.array([r.out_of_memory for r in used]))
    base, tensors, scores = fit.constants[0], fit.constants[1::2], fit.constants[2::2]
    rows = tuple(
        MemoryRow(
            strategy=name,
            base_bytes=_rounded(float(base)),
            tensors=_rounded(float(tensors[i])),
            scores=_rounded(float(scores[i])),
            origin=_origins([r for r in used if r.strategy == name]),
        )
        for i, name in enumerate(names)
    )
    return rows, _quality("memory", [fit], [None])


def _has_peak(record: AttentionRecord) -> bool:
    return record.peak_bytes is not None and not record.suspect_peak


def _memory_features(record: AttentionRecord, names: Sequence[str]) -> list[float]:
    """One, then for each strategy the bytes of q and of the scores, zero for the others'."""
    dtype: torch.dtype = getattr(torch, record.dtype)
    items = record.batch * record.heads * record.q_len * record.head_dim
    own = [items * dtype.itemsize / record.world_size, record.scores * dtype.itemsize]
    return [1.0, *(x if name == record.strategy else 0.0 for name in names for x in own)]


def _grouped(items: Iterable[R], key: Callable[[R], K]) -> dict[K, list[R]]:
    groups: dict[K, list[R]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _origins(records: Sequence[AttentionRecord] | Sequence[MessageRecord]) -> str:
    return "; ".join(dict.fromkeys(r.origin or f"{r.device}, {r.software}" for r in records))


def _quality(what: str, fits: Sequence[Fit], left_out: Sequence[float | None]) -> Quality:
    errors: Matrix = np.concatenate([np.abs(fit.errors) for fit in fits] or [np.zeros(0)])
    known = [x for x in left_out if x is not None]
    return Quality(
        what=what,
        num_records=len(errors),
        median_error=float(np.median(errors)) if len(errors) else 0.0,
        leave_one_out=float(np.median(known)) if known else None,
    )


def _rounded(value: float) -> float:
    """Four significant digits: more would claim a precision that no measurement has."""
    return float(f"{value:.4g}")
