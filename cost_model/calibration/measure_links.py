"""Time the messages that attention sends, over the real process group, on all ranks at once.

Each rank runs these functions together; what they return on rank 0 counts. Messages go through
``ringfx.comm.process_group``, as attention's do.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist

from ringfx.comm.process_group import Exchange, Ranks
from ringfx.cost_model.calibration.measure import Effort, software, synchronise
from ringfx.cost_model.calibration.records import MessageRecord
from ringfx.cost_model.prediction.devices import device_name
from ringfx.cost_model.prediction.profile_rows import Operation

__all__ = ["OPERATIONS", "agreed_count", "measure_contention", "measure_message", "message_sizes"]


def message_sizes(effort: Effort) -> tuple[int, ...]:
    """Bytes that each rank receives, from nearly nothing upwards by fours."""
    sizes = [2**i for i in range(10, 40, 2)]
    return tuple(size for size in sizes if size <= effort.max_message_bytes)


def _send_recv(ranks: Ranks, num_bytes: int, device: str) -> Callable[[], object]:
    send = torch.ones(num_bytes // 4, device=device)
    receive = torch.empty_like(send)
    to, source = ranks.neighbour(1), ranks.neighbour(-1)
    return lambda: ranks.exchange(
        "calibration: send and receive", send=send, to=to, receive=receive, source=source
    ).wait()


def _all_gather(ranks: Ranks, num_bytes: int, device: str) -> Callable[[], object]:
    local = torch.ones(max(1, num_bytes // 4 // (ranks.size - 1)), device=device)
    return lambda: ranks.all_gather("calibration: all-gather", local)


def _reduce_scatter(ranks: Ranks, num_bytes: int, device: str) -> Callable[[], object]:
    parts = torch.ones(ranks.size, max(1, num_bytes // 4 // (ranks.size - 1)), device=device)
    return lambda: ranks.reduce_scatter("calibration: reduce-scatter", parts)


def _all_to_all(ranks: Ranks, num_bytes: int, device: str) -> Callable[[], object]:
    parts = torch.ones(ranks.size, max(1, num_bytes // 4 // (ranks.size - 1)), device=device)
    return lambda: ranks.all_to_all("calibration: all-to-all", parts)


def _all_reduce(ranks: Ranks, num_bytes: int, device: str) -> Callable[[], object]:
    whole = torch.ones(num_bytes // 4, device=device)
    return lambda: ranks.all_reduce("calibration: all-reduce", whole)


OPERATIONS: Mapping[Operation, Callable[[Ranks, int, str], Callable[[], object]]] = {
    "send_recv": _send_recv,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "all_reduce": _all_reduce,
}


def measure_message(
    ranks: Ranks, operation: Operation, num_bytes: int, device: str, link: str, effort: Effort
) -> MessageRecord:
    """Minimum and median time of one collective; all ranks repeat it equally often."""
    run = OPERATIONS[operation](ranks, num_bytes, device)
    times_ms = _agreed_times(ranks, run, device, effort)
    return MessageRecord(
        device=device_name(device) or device,
        software=software(),
        link=link,
        operation=operation,
        world_size=ranks.size,
        bytes=num_bytes,
        min_ms=min(times_ms),
        median_ms=statistics.median(times_ms),
    )


def measure_contention(ranks: Ranks, device: str, effort: Effort) -> float:
    """Nanoseconds that a kernel loses to each byte that travels beside it: (both - larger) / bytes.

    Medians of runs in turn; a message that compute hides wholly gives 0.
    """
    side, num_bytes = 1024, effort.max_message_bytes
    a, b = (torch.ones(side, side, device=device) for _ in range(2))
    message = _send_recv_started(ranks, num_bytes, device)

    def multiply(times: int) -> None:
        for _ in range(times):
            torch.mm(a, b)

    message_ms = statistics.median(_agreed_times(ranks, lambda: message().wait(), device, effort))
    one_ms = statistics.median(_agreed_times(ranks, lambda: multiply(1), device, effort))
    times = agreed_count(ranks, max(1, round(message_ms / one_ms)))

    def together() -> None:
        coming = message()
        multiply(times)
        coming.wait()

    compute_ms = statistics.median(_agreed_times(ranks, lambda: multiply(times), device, effort))
    both_ms = statistics.median(_agreed_times(ranks, together, device, effort))
    lost_ms = max(0.0, both_ms - max(message_ms, compute_ms))
    return 1e6 * lost_ms / num_bytes


def _send_recv_started(ranks: Ranks, num_bytes: int, device: str) -> Callable[[], Exchange]:
    send = torch.ones(num_bytes // 4, device=device)
    receive = torch.empty_like(send)
    to, source = ranks.neighbour(1), ranks.neighbour(-1)
    return lambda: ranks.exchange(
        "calibration: contention", send=send, to=to, receive=receive, source=source
    )


def _agreed_times(
    ranks: Ranks, run: Callable[[], object], device: str, effort: Effort
) -> list[float]:
    """Times of this rank; the number of repetitions is rank 0's, or a message would be missed."""
    first_ms = _synchronised(run, device)
    budget = round(1e3 * effort.seconds_per_case / max(first_ms, 1e-3))
    repeats = agreed_count(ranks, min(200, max(effort.min_repeats, budget)))
    return [_synchronised(run, device) for _ in range(repeats)]


def agreed_count(ranks: Ranks, count: int) -> int:
    """Rank 0's number, on all ranks."""
    shared = torch.tensor([count], dtype=torch.int64)
    assert ranks.group is not None, "messages need a process group"
    if dist.get_backend(ranks.group) == "nccl":
        shared = shared.cuda()
    dist.broadcast(shared, group=ranks.group, group_src=0)
    return int(shared.item())


def _synchronised(run: Callable[[], object], device: str) -> float:
    """Milliseconds of one run that all ranks start together."""
    dist.barrier()
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return 1e3 * (time.perf_counter() - start)
