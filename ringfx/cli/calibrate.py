"""``ringfx calibrate``: a progress bar around a calibration, and what came of it."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ringfx.cost_model.calibration.calibrate import Measurements, calibrate, make_profile
from ringfx.cost_model.calibration.measure import Effort
from ringfx.cost_model.calibration.records import write_records
from ringfx.cost_model.prediction.profile import Profile, profile_json, profiles_folder
from ringfx.errors import InvalidArgument
from ringfx.validation.text_files import check_writable, write_text

__all__ = ["check_device", "run"]

QUICK = Effort(seconds_per_case=0.03, min_repeats=3, max_tokens=1024, max_message_bytes=2**20)


def run(
    *,
    ranks: int,
    device: str,
    quick: bool,
    name: str | None,
    out: Path | None,
    records: Path | None,
) -> None:
    """Measure, write the profile and say where it is and how well it fits.

    Raises
    ------
    InvalidArgument
        The device is unknown or absent, or a file cannot be written: said before anything is
        measured.
    """
    check_device(device, ranks)
    if name is not None:
        _check_name(name)
    for path in (out or profiles_folder() / f"{name or 'ringfx'}.json", records):
        if path is not None:
            check_writable(path, make_folders=True)
    measured = _measured(device, ranks, QUICK if quick else Effort())
    if measured is None:
        return
    profile = make_profile(measured, name)
    path = out or profiles_folder() / f"{profile.name}.json"
    write_text(path, profile_json(profile))
    if records is not None:
        write_records((*measured.kernels, *measured.messages, *measured.layers), records)
    print(_summary(profile, path))


def _check_name(name: str) -> None:
    """A profile is found again by its name, which is its file's."""
    if (
        name in ("", "..")
        or Path(name).name != name
        or not name.isprintable()
        or len(name.encode()) > 200
    ):
        raise InvalidArgument(
            f"--name {name[:60]!r} is not a valid profile name. Do: give a name that is also a "
            "valid file name, such as our-cluster; choose the folder with --out."
        )


def check_device(device: str, ranks: int) -> None:
    """Refuse a device that is unknown, or that there are fewer of than ranks."""
    if device not in ("cpu", "cuda"):
        raise InvalidArgument(f"unknown device {device!r}. Do: give --device cpu or --device cuda.")
    if device == "cuda" and torch.cuda.device_count() < ranks:
        raise InvalidArgument(
            f"{ranks} ranks need {ranks} GPUs, but this machine has {torch.cuda.device_count()}. "
            "Do: give --ranks, or run under torchrun on more machines."
        )


def _measured(device: str, ranks: int, effort: Effort) -> Measurements | None:
    columns = (BarColumn(), TextColumn("{task.completed}/{task.total} {task.description}"))
    console, elapsed = Console(stderr=True), TimeElapsedColumn()
    with Progress(*columns, elapsed, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting ranks", total=None)

        def show(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        return calibrate(device, num_ranks=ranks, effort=effort, progress=show)


def _summary(profile: Profile, path: Path) -> str:
    lines = [f"{profile.name}: {profile.origin}", f"  fit: {profile.quality}"]
    lines += [
        f"  {row.kernel} {row.dtype} {row.direction}: {row.gflops:,.0f} GFLOP/s,"
        f" {row.call_us:.0f} us a call, {row.ns_per_pair:.2f} ns a pair"
        for row in profile.kernels
    ]
    lines += [
        f"  products, {row.dtype} {row.direction}: {row.gflops:,.0f} GFLOP/s,"
        f" {row.call_us:.0f} us a call"
        for row in profile.products
    ]
    lines += [
        f"  {row.operation}: {row.gbytes_per_s:.2f} GB/s, {row.latency_us:.0f} us"
        for row in profile.links
    ]
    lines += [
        f"  any layer, {row.strategy} {row.direction}: {row.layer_us:,.0f} us"
        for row in profile.overheads
    ]
    lost, again = f"{profile.contention_ns_per_byte:.3f} ns", f"{profile.noise - 1:.0%}"
    lines += [
        f"  memory {profile.memory_gbytes_per_s:.1f} GB/s, masks {profile.mask_ns_per_pair:.2f} ns"
        f" a pair and {profile.mask_us_per_tile:.0f} us a tile",
        f"  buffers {profile.handling_ns_per_byte:.2f} ns a byte, a merge"
        f" {profile.merge_us:.0f} us",
        f"  compute slows down by {lost} for each byte sent at the same time; a message within a "
        f"step waits {profile.message_wait_us:,.0f} us; repeated measurements differ by {again}",
    ]
    return "\n".join([*lines, f"  written to {path}"])
