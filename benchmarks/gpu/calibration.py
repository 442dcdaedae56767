"""Stage ``calibrate``: this device's profile, and its error on sizes that nothing was fitted to."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.gpu.stage import Report, Setting
from ringfx.cost_model import predict
from ringfx.cost_model.calibration.bench import bench_site
from ringfx.cost_model.calibration.calibrate import calibrate, make_profile
from ringfx.cost_model.calibration.from_records import fit_kernels
from ringfx.cost_model.calibration.measure import Effort
from ringfx.cost_model.calibration.records import AttentionRecord
from ringfx.cost_model.prediction.profile import Profile, profile_json
from ringfx.cost_model.prediction.profile_rows import KernelRow
from ringfx.ops.tiling.flops import flops_per_pair
from ringfx.strategies import DEFAULT, STRATEGIES

__all__ = ["run"]

HELD_OUT_HEADS = 5
"""The sizes that fill no block: nothing is fitted to them here."""
GOAL = 0.05


def run(setting: Setting) -> Report:
    report = Report(stage="calibrate", setting=setting)
    effort = (
        Effort(seconds_per_case=0.001, min_repeats=2, max_tokens=128, max_message_bytes=4096)
        if setting.small
        else Effort(seconds_per_case=0.1, max_tokens=8192)
    )
    kept: dict[str, Any] = {}

    def measured() -> dict[str, Any]:
        found = calibrate(setting.device, num_ranks=1, effort=effort, progress=_say)
        assert found is not None, "one rank is the first"
        profile = make_profile(found, "this-gpu")
        kept.update(profile=profile, kernels=found.kernels)
        path = setting.folder / "profile.json"
        path.write_text(profile_json(profile))
        return {"profile": path.name, "device": profile.device_name, "quality": profile.quality}

    report.tried("profile", measured)
    if kept:
        report.tried("held out", lambda: _held_out(kept["kernels"], setting))
        report.tried("kernels by their rates", lambda: _rates(kept["profile"]))
        report.tried("kernels that plans take", lambda: _taken(kept["profile"], setting))
    return report


def _say(what: str, done: int, total: int) -> None:
    if done % 20 == 0:
        print(f"[calibrate] {done} of {total}: {what}", flush=True)


def _held_out(records: tuple[AttentionRecord, ...], setting: Setting) -> dict[str, Any]:
    """Fitted to the sizes that fill blocks, and held against those that do not."""
    rows, _ = fit_kernels([r for r in records if r.heads != HELD_OUT_HEADS])
    errors = []
    for record in records:
        row = next((r for r in rows if _of(r, record)), None)
        if record.heads == HELD_OUT_HEADS and row is not None and record.median_ms:
            errors.append(abs(_ms(row, record) / record.median_ms - 1))
    median = statistics.median(errors)
    return {
        "records": len(errors),
        "median_error": median,
        "goal": GOAL,
        "ok": setting.small or not setting.is_cuda or median <= GOAL,
    }


def _of(row: KernelRow, record: AttentionRecord) -> bool:
    return (row.kernel, row.dtype, row.direction) == (
        record.kernel,
        record.dtype,
        record.direction,
    )


def _ms(row: KernelRow, record: AttentionRecord) -> float:
    flops = record.pairs * flops_per_pair(record.head_dim, record.v_head_dim, record.direction)
    return row.call_us / 1e3 + flops / row.gflops / 1e6 + record.pairs * row.ns_per_pair / 1e6


def _taken(profile: Profile, setting: Setting) -> dict[str, Any]:
    """What a layer is planned with under this profile, by type, head dim and mask."""
    found: dict[str, Any] = {}
    for dtype in ("bfloat16", "float16", "float32"):
        for head_dim in (64, 128, 256):
            for what, window in (("causal", None), ("window", 1024)):
                site = bench_site(
                    tokens=8192, heads=8, head_dim=head_dim, dtype=dtype, window=window,
                    device=setting.device,
                )  # fmt: skip
                kernel = predict(site, STRATEGIES[DEFAULT], 1, profile).kernel
                found[f"{dtype}, head dim {head_dim}, {what}"] = kernel
    return found


def _rates(profile: Profile) -> dict[str, Any]:
    return {
        f"{row.kernel}, {row.dtype}, {row.direction}": round(row.gflops / 1e3, 2)
        for row in profile.kernels
    }
