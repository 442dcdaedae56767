"""Measure this machine and write its profile: kernels, memory, masks, links, contention.

All ranks measure at once, as they will run at once: a core that is alone is faster than one beside
a busy neighbour. Ranks are started here on one machine, or found in the environment under torchrun.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, get_args

import torch
import torch.distributed as dist

from ringfx.comm.process_group import Ranks
from ringfx.cost_model.calibration.bench import BenchTask, admitted, measure
from ringfx.cost_model.calibration.from_records import fit_kernels, fit_links
from ringfx.cost_model.calibration.layers import fit_layers, is_small, layer_records, layer_sites
from ringfx.cost_model.calibration.measure import (
    Effort,
    KernelCase,
    kernel_cases,
    mask_costs,
    masked_ns_per_pair,
    measure_kernel,
    memory_gbytes_per_s,
    software,
)
from ringfx.cost_model.calibration.measure_links import (
    OPERATIONS,
    measure_contention,
    measure_message,
    message_sizes,
)
from ringfx.cost_model.calibration.measure_operators import (
    DIRECTIONS,
    OperatorRates,
    fresh_ns_per_byte,
    operator_rates,
    product_dtypes,
    product_row,
)
from ringfx.cost_model.calibration.measure_step import StepTimes, predicted_ms, step_times
from ringfx.cost_model.calibration.measure_waits import (
    StepWithMessages,
    fit_wait_us,
    steps_with_messages,
)
from ringfx.cost_model.calibration.on_ranks import Progress, on_ranks
from ringfx.cost_model.calibration.records import AttentionRecord, MessageRecord
from ringfx.cost_model.prediction.devices import device_capability, device_name
from ringfx.cost_model.prediction.kernel_choice import REFERENCE
from ringfx.cost_model.prediction.profile import LOCAL, Profile
from ringfx.cost_model.prediction.profile_rows import Direction, KernelRow, Operation, Scope
from ringfx.strategies import DEFAULT

__all__ = ["Measurements", "calibrate", "make_profile", "measure_layers"]

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
    layers: tuple[AttentionRecord, ...]
    """Layers of each strategy: what any layer, any call and any byte of buffers costs."""
    memory_gbytes_per_s: float
    mask_us_per_tile: float
    mask_ns_per_pair: float
    masked_ns_per_pair: Mapping[tuple[str, Direction], float]
    """By kernel and direction."""
    contention_ns_per_byte: float
    noise: float
    operators: OperatorRates
    steps: StepTimes
    """Of a small model, whole."""
    sending: tuple[StepWithMessages, ...]
    """The same with messages; empty at one rank."""
    capability: str = ""
    """The card's, such as 9.0."""


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
    products = [(dtype, way) for dtype in product_dtypes(device) for way in DIRECTIONS]
    cases = len(kernel_cases(device, effort)) + len(_messages(ranks, effort)) + len(products)
    steps = _Steps(progress, cases + 8)
    steps.next("whole steps")  # first: later the heap has room for all that they make
    fresh = fresh_ns_per_byte(device, effort)
    whole_steps = step_times(device, effort)
    kernels = tuple(
        measure_kernel(device, case, effort)
        for case in steps.each(kernel_cases(device, effort), _kernel_words)
    )
    messages = tuple(
        measure_message(ranks, operation, size, device, link, effort)
        for operation, size in steps.each(_messages(ranks, effort), lambda m: f"{m[0]}, {m[1]} B")
    )
    steps.next("whole layers")
    layers = tuple(measure_layers(ranks, device, link, effort))
    steps.next("memory")
    memory = memory_gbytes_per_s(device, effort)
    steps.next("masks")
    mask_us_per_tile, mask_ns_per_pair = mask_costs(device, effort)
    masked = {
        (kernel, direction): masked_ns_per_pair(device, kernel, direction, effort)
        for kernel in dict.fromkeys(case.kernel for case in kernel_cases(device, effort))
        for direction in get_args(Direction)
    }
    rows = [
        product_row(device, dtype, way, effort)
        for dtype, way in steps.each(products, lambda x: f"matrix products, {x[0]}, {x[1]}")
    ]
    steps.next("other operators")
    operators = operator_rates(rows, fresh, device, effort)
    steps.next("compute during communication")
    contention = measure_contention(ranks, device, effort) if ranks.size > 1 else 0.0
    steps.next("messages within a step")
    sending = steps_with_messages(ranks, device, effort) if ranks.size > 1 else ()
    steps.next("noise: repeated measurements")
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
        layers=layers,
        memory_gbytes_per_s=memory,
        mask_us_per_tile=mask_us_per_tile,
        mask_ns_per_pair=mask_ns_per_pair,
        masked_ns_per_pair=masked,
        contention_ns_per_byte=contention,
        noise=_noise(device, effort),
        operators=operators,
        steps=whole_steps,
        sending=sending,
        capability=device_capability(device),
    )


def _messages(ranks: Ranks, effort: Effort) -> list[tuple[Operation, int]]:
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


def measure_layers(
    ranks: Ranks, device: str, link: str, effort: Effort
) -> Iterator[AttentionRecord]:
    """A few layers under every strategy, and on one rank."""
    alone = dataclasses.replace(ranks, rank=0, size=1)
    for site in layer_sites(ranks.size, device, effort.max_tokens):
        share = effort.seconds_per_case / 0.4
        rounds = max(effort.min_repeats, round(share * (SMALL_ROUNDS if is_small(site) else 6)))
        if ranks.size > 1:
            names = admitted(site, ranks.size)
            task = BenchTask(site=site, strategies=names, rounds=rounds)
            for name, samples in measure(ranks, device, _quiet, task).items():
                yield from layer_records(site, name, samples, ranks.size, link)
        task = BenchTask(site=site, strategies=(DEFAULT,), rounds=rounds)
        samples = measure(alone, device, _quiet, task)[DEFAULT]
        yield from layer_records(site, LOCAL, samples, 1, "")


SMALL_ROUNDS = 30


def _quiet(what: str, done: int, total: int) -> None:
    """The step as a whole is shown, not its rounds."""


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
    fitted, kernel_quality = fit_kernels(measured.kernels)
    masked = measured.masked_ns_per_pair
    kernels = tuple(
        dataclasses.replace(
            row, masked_ns_per_pair=round(masked.get((row.kernel, row.direction), 0.0), 4)
        )
        for row in fitted
    )
    scopes: dict[str, Scope] = {r.link: measured.scope for r in measured.messages}
    links, link_quality = fit_links(measured.messages, scopes)
    words = [kernel_quality.words()] + ([link_quality.words()] if links else [])
    link_names = ", ".join(dict.fromkeys(r.link for r in measured.messages)) or "no link"
    bare = Profile(
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
        fused_kernel=_fused(kernels),
        kernels=kernels,
        links=links,
        products=measured.operators.products,
        elementwise_gbytes_per_s=measured.operators.elementwise_gbytes_per_s,
        elementwise_us=measured.operators.elementwise_us,
        fused_gbytes_per_s=measured.operators.fused_gbytes_per_s,
        fresh_ns_per_byte=measured.operators.fresh_ns_per_byte,
        optimizer_gbytes_per_s=round(measured.steps.optimizer_gbytes_per_s, 3),
        device_gbytes=measured.operators.device_gbytes,
        host_gbytes_per_s=measured.operators.host_gbytes_per_s,
        host_gbytes=_host_gbytes_a_rank(measured),
        host_origin="" if measured.operators.host_gbytes_per_s is None else HOST_ORIGIN,
        mask_ns_per_pair=round(measured.mask_ns_per_pair, 4),
        mask_us_per_tile=round(measured.mask_us_per_tile, 2),
        contention_ns_per_byte=round(measured.contention_ns_per_byte, 4),
        noise=round(measured.noise, 3),
        date=measured.date,
        capability=measured.capability,
        torch=torch.__version__.split("+")[0],
    )
    priced = dataclasses.replace(
        _with_step_factors(bare, measured.steps),
        message_wait_us=fit_wait_us(measured.sending, measured.num_ranks, bare),
    )
    profile, layer_quality = fit_layers(measured.layers, priced)
    return dataclasses.replace(profile, quality="; ".join([*words, layer_quality.words()]))


def _with_step_factors(profile: Profile, steps: StepTimes) -> Profile:
    """With how much longer whole steps take than the rates of their operators say."""
    eager = _factor(steps.eager_ms, predicted_ms(profile, steps.tokens, fused=False))
    fused = eager
    if steps.fused_ms is not None:
        fused = _factor(steps.fused_ms, predicted_ms(profile, steps.tokens, fused=True))
    return dataclasses.replace(profile, step_factor=eager, fused_step_factor=fused)


def _factor(measured: Sequence[float], predicted: Sequence[float]) -> float:
    ratios = [a / b for a, b in zip(measured, predicted, strict=True)]
    return round(statistics.geometric_mean(ratios), 4)


HOST_ORIGIN = "256 MiB to pinned memory and back; three quarters of the machine's memory"


def _host_gbytes_a_rank(measured: Measurements) -> float | None:
    whole = measured.operators.host_gbytes
    return None if whole is None else round(whole / max(1, measured.ranks_per_node), 1)


def _fused(kernels: Iterable[KernelRow]) -> str:
    """The fastest in products."""
    fused = [row for row in kernels if row.kernel != REFERENCE]
    return max(fused, key=lambda row: row.gflops).kernel if fused else REFERENCE


def _slug(measured: Measurements) -> str:
    name = re.sub(r"[^a-z0-9]+", "-", measured.device_name.lower()).strip("-")
    return f"{name}-{measured.num_ranks}-ranks"
