"""``measure``: records of every case that has none yet, until time is over."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.prediction.cases import CASES, NUM_RANKS, Case, case_of
from benchmarks.slow_link import ADDRESSES, PORT, _link
from ringfx.comm.process_group import Ranks
from ringfx.cost_model.calibration.bench import BenchTask, Sample, admitted, measure
from ringfx.cost_model.calibration.measure import Effort, software
from ringfx.cost_model.calibration.measure_links import (
    OPERATIONS,
    agreed_count,
    measure_message,
    message_sizes,
)
from ringfx.cost_model.calibration.on_ranks import Progress, on_ranks
from ringfx.cost_model.calibration.records import (
    AttentionRecord,
    MessageRecord,
    Record,
    read_records,
)
from ringfx.cost_model.calibration.records import write_records as write
from ringfx.cost_model.prediction.devices import device_name
from ringfx.cost_model.prediction.profile_rows import Direction

__all__ = ["measure_command"]

MOST_OF_OTHERS = 0.06
"""A case during which others took more of the machine than this is measured again later."""
LINK_EFFORT = Effort(seconds_per_case=0.3, min_repeats=3, max_message_bytes=2**20)


@dataclass(frozen=True, kw_only=True)
class _Task:
    cases: tuple[Case, ...]
    rounds: int
    until: float
    """Wall time after which no further case is begun."""
    messages_over: str
    """The link whose messages are to be measured first; empty: none."""
    records: Path


def _measure_all(ranks: Ranks, device: str, progress: Progress, task: _Task) -> int:
    """Appends the records of each case as soon as it is done; how many cases were."""
    if task.messages_over:
        sizes = [size for size in message_sizes(LINK_EFFORT) if size >= 2**14]
        _append(ranks, task.records, (
            measure_message(ranks, operation, size, device, task.messages_over, LINK_EFFORT)
            for operation in OPERATIONS
            for size in sizes
        ))  # fmt: skip
    for done, case in enumerate(task.cases):
        if agreed_count(ranks, int(time.time() > task.until)):
            return done
        progress(str(case), done, len(task.cases))
        names = admitted(case.site, ranks.size)
        bench = BenchTask(site=case.site, strategies=names, rounds=task.rounds)
        watch = _OthersWatch(ranks)
        found = measure(ranks, device, lambda *step: None, bench)
        others = watch.share()
        if others > MOST_OF_OTHERS:
            progress(f"not kept: others took {others:.0%} of the machine", done, len(task.cases))
        else:
            _append(ranks, task.records, _records(case, found))
    return len(task.cases)


class _OthersWatch:
    """What share of the machine's time went to other processes since this was made."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._busy_s, self._own_s, self._start = _busy_seconds(), _own_seconds(), time.time()

    def share(self) -> float:
        """The same on all ranks: rank 0's view, with the time of all ranks."""
        own = torch.tensor([_own_seconds() - self._own_s], dtype=torch.float64)
        dist.all_reduce(own)
        elapsed_s = (time.time() - self._start) * (os.cpu_count() or 1)
        mine = max(0.0, _busy_seconds() - self._busy_s - float(own)) / elapsed_s
        return agreed_count(self._ranks, round(1e4 * mine)) / 1e4


def _busy_seconds() -> float:
    """Of all cores, since the machine started; time that its host stole counts as busy."""
    line = Path("/proc/stat").read_text().splitlines()[0]
    user, nice, system, _idle, _iowait, *rest = (int(x) for x in line.split()[1:9])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system


def _append(ranks: Ranks, path: Path, records: Iterable[Record]) -> None:
    found = tuple(records)
    if ranks.rank == 0:
        before = read_records(path) if path.exists() else ()
        write((*before, *found), path)


def _records(
    case: Case, found: Mapping[str, Mapping[Direction, Sample]]
) -> Iterator[AttentionRecord]:
    for strategy, samples in found.items():
        for direction, sample in samples.items():
            yield AttentionRecord(
                device=device_name("cpu") or "cpu",
                software=software(),
                dtype=case.dtype,
                strategy=strategy,
                kernel="",
                batch=case.batch,
                heads=case.heads,
                kv_heads=case.kv_heads,
                head_dim=case.head_dim,
                v_head_dim=case.head_dim,
                q_len=case.tokens,
                kv_len=case.tokens,
                mask=case.mask,
                density=case.site.density,
                world_size=NUM_RANKS,
                direction=direction,
                link=case.link,
                median_ms=round(sample.median_ms, 4),
                spread=round(sample.spread, 4),
                again=round(sample.again, 4),
            )


def measure_command(options: argparse.Namespace) -> None:
    done = read_records(options.records) if options.records.exists() else ()
    known = {case_of(r) for r in done if isinstance(r, AttentionRecord)}
    over = {r.link for r in done if isinstance(r, MessageRecord)}
    task = _Task(
        cases=tuple(c for c in CASES if c.link == options.link and c not in known),
        rounds=options.rounds,
        until=time.time() + options.seconds,
        messages_over="" if options.link in ("loopback", *over) else options.link,
        records=options.records,
    )
    if options.link != "loopback" and "RANK" not in os.environ:
        _in_namespaces(options.link)
        return
    torch.set_num_threads(1)
    finished = on_ranks(_measure_all, task, device="cpu", num_ranks=NUM_RANKS, progress=_show)
    if finished is not None:
        print(f"{finished} of {len(task.cases)} missing cases measured over {options.link}")


def _show(what: str, done: int, total: int) -> None:
    print(f"{done}/{total} {what}", file=sys.stderr, flush=True)


def _in_namespaces(link: str) -> None:
    """This command again, once in each of two network namespaces that a slow link joins."""
    with _link(link) as names:
        ranks = []
        for rank, name in enumerate(names):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": str(NUM_RANKS),
                "MASTER_ADDR": ADDRESSES[0],
                "MASTER_PORT": str(PORT),
                "GLOO_SOCKET_IFNAME": f"rfxveth{rank}",
            }
            command = ("ip", "netns", "exec", name, sys.executable, "-W", "ignore")
            words = (*command, "-m", "benchmarks.prediction", *sys.argv[1:])
            ranks.append(subprocess.Popen(words, env=environment))
        failed = [code for process in ranks if (code := process.wait())]
    if failed:
        raise SystemExit(f"a rank ended with {failed}")
