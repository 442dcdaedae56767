"""What whole layers cost beyond their kernels and messages, from a few measured ones.

layer      what any layer costs: max(0, time of one of hardly any tokens - the other terms)
handling   what a byte of the layer's buffers costs, and what a forward call's merge does (mostly
           seen in simple's many calls): the least of sum ((A x - y) / t)^2, x >= 0, with y what
           layers of some size take beyond the other terms, t all of it
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.optimize import nnls

from ringfx.cost_model.calibration.bench import Sample, bench_site
from ringfx.cost_model.calibration.from_records import Quality
from ringfx.cost_model.calibration.measure import software
from ringfx.cost_model.calibration.records import AttentionRecord
from ringfx.cost_model.prediction.devices import device_name
from ringfx.cost_model.prediction.predict import predict
from ringfx.cost_model.prediction.profile import LOCAL, Profile
from ringfx.cost_model.prediction.profile_rows import Direction, OverheadRow
from ringfx.ir.values import AttentionSite
from ringfx.strategies import DEFAULT, STRATEGIES

__all__ = ["fit_layers", "is_small", "layer_records", "layer_sites"]

SMALL_TOKENS, SMALL_DIM = 32, 16
"""Of one rank, and of its only head: arithmetic that is next to nothing."""

SIZES = ((512, 4, 64), (768, 8, 32), (1024, 2, 128))
"""Tokens and heads of one rank, and head dims, of layers of some size."""


def layer_sites(num_ranks: int, device: str, max_tokens: int) -> tuple[AttentionSite, ...]:
    """Attentions that every strategy can run, the smallest first."""
    small = (SMALL_TOKENS, 1, SMALL_DIM)
    sizes = (small, *(size for size in SIZES if size[0] <= max_tokens // 4))
    return tuple(
        bench_site(tokens=tokens * num_ranks, heads=heads * num_ranks, head_dim=dim, device=device)
        for tokens, heads, dim in sizes
    )


def is_small(layer: AttentionSite | AttentionRecord) -> bool:
    """Whether its arithmetic is next to nothing."""
    return layer.head_dim == SMALL_DIM


def layer_records(
    site: AttentionSite,
    strategy: str,
    samples: Mapping[Direction, Sample],
    world_size: int,
    link: str,
) -> Iterator[AttentionRecord]:
    """One record a direction; ``strategy`` is ``LOCAL`` for one rank."""
    for direction, sample in samples.items():
        yield AttentionRecord(
            device=device_name(site.device) or site.device,
            software=software(),
            dtype=site.dtype,
            strategy=strategy,
            kernel="",
            batch=site.batch,
            heads=site.heads,
            kv_heads=site.kv_heads,
            head_dim=site.head_dim,
            v_head_dim=site.v_head_dim,
            q_len=site.q_len,
            kv_len=site.kv_len,
            mask=site.mask_words,
            density=site.density,
            world_size=world_size,
            direction=direction,
            link=link,
            median_ms=sample.median_ms,
            spread=sample.spread,
            again=sample.again,
        )


def fit_layers(records: Sequence[AttentionRecord], bare: Profile) -> tuple[Profile, Quality]:
    """``bare``, which prices none of them, with what any layer, byte of buffers and merge costs."""
    small = [record for record in records if is_small(record)]
    large = [record for record in records if not is_small(record)]
    profile = _with_overheads(bare, small)
    for _ in range(ROUNDS if large else 0):
        found = _around_calls(large, replace(bare, overheads=profile.overheads))
        profile = _with_overheads(replace(bare, **found), small)
    errors = [abs(_predicted_ms(r, profile) / _ms(r) - 1) for r in (large or small)]
    return profile, Quality(
        what="layers",
        num_records=len(errors),
        median_error=float(np.median(errors)) if errors else 0.0,
        leave_one_out=None,
    )


ROUNDS = 4
"""Small layers have calls too, so what any layer costs and what a call costs are told apart in
turns: each leaves a tenth of the error."""
AROUND_CALLS = ("handling_ns_per_byte", "merge_us")
"""Fields of a profile that layers of some size tell."""


def _around_calls(records: Sequence[AttentionRecord], profile: Profile) -> dict[str, Any]:
    """Each of ``AROUND_CALLS``, by least squares on relative misses."""
    base = np.array([_predicted_ms(record, profile) for record in records])
    seen = np.array([_ms(record) for record in records])
    units = [replace(profile, **{name: 1.0}) for name in AROUND_CALLS]  # type: ignore[arg-type]
    features = [[_predicted_ms(record, unit) for unit in units] for record in records]
    found, _ = nnls((np.array(features) - base[:, None]) / seen[:, None], (seen - base) / seen)
    return {name: float(f"{x:.4g}") for name, x in zip(AROUND_CALLS, found, strict=True)}


def _with_overheads(profile: Profile, small: Sequence[AttentionRecord]) -> Profile:
    return replace(profile, overheads=tuple(_overhead(record, profile) for record in small))


def _overhead(record: AttentionRecord, profile: Profile) -> OverheadRow:
    missing_ms = max(0.0, _ms(record) - _predicted_ms(record, profile))
    return OverheadRow(
        strategy=record.strategy,
        direction=record.direction,
        layer_us=round(1e3 * missing_ms, 1),
        origin=(
            f"{record.device}, {record.software}; {record.q_len} tokens in"
            f" {1e3 * _ms(record):.0f} us, less the other terms"
        ),
    )


def _predicted_ms(record: AttentionRecord, profile: Profile) -> float:
    site = bench_site(
        tokens=record.q_len, heads=record.heads, head_dim=record.head_dim, dtype=record.dtype
    )
    name = DEFAULT if record.strategy == LOCAL else record.strategy
    found = predict(site, STRATEGIES[name], record.world_size, profile)
    return found.forward_ms if record.direction == "forward" else found.backward_ms


def _ms(record: AttentionRecord) -> float:
    assert record.median_ms is not None, record
    return record.median_ms
