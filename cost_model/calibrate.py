"""Measure this machine and write its profile: kernels, memory, masks, links, overlap.

All ranks measure at once, as they will run at once: a core that is alone is faster than one beside
a busy neighbour. Ranks are started here on one machine, or found in the environment under torchrun.
"""

from __future__ import annotations

import datetime
import os
import re
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from ringfx.cost_model.devices import device_name
from ringfx.cost_model.from_records import fit_kernels, fit_links
from ringfx.cost_model.measure import (
    Effort,
    KernelCase,
    kernel_cases,
    mask_ns_per_pair,
    measure_kernel,
    memory_gbytes_per_s,
    software,
)
from ringfx.cost_model.measure_links import (
    OPERATIONS,
    measure_message,
    measure_overlap,
    message_sizes,
)
from ringfx.cost_model.on_ranks import Progress, on_ranks
from ringfx.cost_model.profile import Collective, Profile, Scope
from ringfx.cost_model.records import AttentionRecord, MessageRecord
from ringfx.ops.ranks import Ranks

__all__ = ["Measurements", "calibrate", "make_profile"]

T = TypeVar("T")

NOISE_BLOCKS = 3


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """All that one calibration measured."""

    device: str
    device_name: str
    software: str
    date: str
    num_ranks: int
    scope: Scope
    ranks_per_node: int
    kernels: tuple[AttentionRecord, ...]
    messages: tuple[MessageRecord, ...]
    memory_gbytes_per_s: float
    mask_ns_per_pair: float
    overlap: float
    noise: float


def calibrate(
    device: str, *, num_ranks: int, effort: Effort, progress: Progress
) -> Measurements | None:
    """Measure; None on all ranks but the first of a torchrun job.

    Parameters
    ----------
    num_ranks
        Ranks to start on this machine; under torchrun its ranks are taken instead.

    Raises
    ------
    CommunicationError
        A rank failed; the text holds its last words.
    """
    return on_ranks(_measure, effort, device=device, num_ranks=num_ranks, progress=progress)


# --- what every rank does -----------------------------------------------------------------------


def _measure(ranks: Ranks, device: str, progress: Progress, effort: Effort) -> Measurements:
    link, scope, per_node = _link(ranks)
    steps = _Steps(progress, len(kernel_cases(device, effort)) + len(_messages(ranks, effort)) + 4)
    kernels = tuple(
        measure_kernel(device, case, effort)
        for case in steps.each(kernel_cases(device, effort), _kernel_words)
    )
    messages = tuple(
        measure_message(ranks, operation, size, device, link, effort)
        for operation, size in steps.each(_messages(ranks, effort), lambda m: f"{m[0]}, {m[1]} B")
    )
    steps.next("memory")
    memory = memory_gbytes_per_s(device, effort)
    steps.next("masks")
    mask = mask_ns_per_pair(device, effort)
    steps.next("overlap of messages with compute")
    overlap = measure_overlap(ranks, device, effort) if ranks.size > 1 else 1.0
    steps.next("noise: the same thing again")
    return Measurements(
        device=device,
        device_name=device_name(device) or device,
        software=software(),
        date=datetime.date.today().isoformat(),
        num_ranks=ranks.size,
        scope=scope,
        ranks_per_node=per_node,
        kernels=kernels,
        messages=messages,
        memory_gbytes_per_s=memory,
        mask_ns_per_pair=mask,
        overlap=overlap,
        noise=_noise(device, effort),
    )


def _messages(ranks: Ranks, effort: Effort) -> list[tuple[Collective, int]]:
    if ranks.size == 1:
        return []
    return [(operation, size) for operation in OPERATIONS for size in message_sizes(effort)]


def _link(ranks: Ranks) -> tuple[str, Scope, int]:
    """The link's name, whether ranks share a machine, and how many may."""
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size))
    if per_node < ranks.size:
        return "network", "network", per_node
    return ("NVLink or PCIe" if torch.cuda.is_available() else "loopback"), "node", per_node


class _Steps:
    """Counts what is done, and keeps all ranks at the same step."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def next(self, what: str) -> None:
        dist.barrier()
        self.progress(what, self.done, self.total)
        self.done += 1

    def each(self, items: Iterable[T], words: Callable[[T], str]) -> Iterator[T]:
        for item in items:
            self.next(words(item))
            yield item


def _kernel_words(case: KernelCase) -> str:
    return (
        f"{case.kernel} {case.direction}, {case.dtype}, {case.heads} heads of {case.head_dim},"
        f" {case.tokens} tokens"
    )


def _noise(device: str, effort: Effort) -> float:
    """A/A: the largest over the smallest median of the same case, measured again and again."""
    ratios = []
    for case in kernel_cases(device, effort)[3::40]:
        medians = [measure_kernel(device, case, effort).median_ms or 0 for _ in range(NOISE_BLOCKS)]
        ratios.append(max(medians) / min(medians))
    return statistics.median(ratios)


# --- the profile ----------------------------------------------------------------------------------


def make_profile(measured: Measurements, name: str | None = None) -> Profile:
    """The profile that the measurements fit, with the quality of the fit."""
    kernels, kernel_quality = fit_kernels(measured.kernels)
    scopes: dict[str, Scope] = {r.link: measured.scope for r in measured.messages}
    links, link_quality = fit_links(measured.messages, scopes)
    words = [kernel_quality.words()] + ([link_quality.words()] if links else [])
    link_names = ", ".join(dict.fromkeys(r.link for r in measured.messages)) or "no link"
    fused = {row.kernel for row in kernels} - {"math"}
    return Profile(
        name=name or _slug(measured),
        device=measured.device,
        device_name=measured.device_name,
        kind="measured",
        origin=(
            f"measured {measured.date} on {measured.device_name} with {measured.num_ranks} ranks"
            f" at once over {link_names}, {measured.software} a rank"
        ),
        ranks_per_node=measured.ranks_per_node,
        memory_gbytes_per_s=round(measured.memory_gbytes_per_s, 3),
        memory_origin="adding two arrays of 64 MiB",
        fused_kernel=min(fused) if fused else "math",
        kernels=kernels,
        links=links,
        mask_ns_per_pair=round(measured.mask_ns_per_pair, 4),
        overlap=round(measured.overlap, 3),
        noise=round(measured.noise, 3),
        quality="; ".join(words),
    )


def _slug(measured: Measurements) -> str:
    name = re.sub(r"[^a-z0-9]+", "-", measured.device_name.lower()).strip("-")
    return f"{name}-{measured.num_ranks}-ranks"
