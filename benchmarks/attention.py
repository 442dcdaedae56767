"""Split attention against the physical limit of the machine: ``python -m benchmarks.attention``.

Every contestant runs once in each round, one after the other, on the same ranks; a figure is the
median over rounds of its time divided by the reference's time in the same round, with quartiles. A
time is that of the slowest rank, from a common start.

    (a) whole   one process with p threads, F.scaled_dot_product_attention on the whole problem
    (b) heads   p processes of one thread, each F.scaled_dot_product_attention on its share of the
                heads: perfectly parallel, no communication
    (c) rows    each rank its own zigzag rows, all K and V already there: what balance by rows costs
    naive       matmul, softmax, matmul of the whole problem in one thread, head by head; / p

and what others do on the same ranks: ``benchmarks/peers.py``.

Memory is the peak resident memory of one forward and backward minus that before it, K, V, q and the
gradient of the output already there; the worst rank.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import json
import multiprocessing
import os
import platform
import socket
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F

from benchmarks.peers import PEERS
from ringfx import ops
from ringfx.comm import stats
from ringfx.comm.process_group import Ranks
from ringfx.ir.attention_spec import AttentionSpec
from ringfx.ir.layout import Layout
from ringfx.ir.tiles import CAUSAL
from ringfx.ops.kernels import kernel
from ringfx.ops.tiling.attention_call import Problem
from ringfx.ops.tiling.merge import Output, Sums, attend, attend_backward
from ringfx.ops.tiling.pieces import Run, Tiling
from ringfx.strategies.buffer_pool import POOL

Tensor = torch.Tensor
STRATEGIES = ("production", "ulysses", "collective", "simple")
REFERENCES = ("whole", "heads", "rows")
BARS: Mapping[tuple[str, bool], tuple[str, float]] = {
    # strategy, backward: reference, largest ratio
    ("production", True): ("heads", 1.08),
    ("production", False): ("heads", 1.12),
    ("collective", True): ("heads", 1.25),
    ("collective", False): ("heads", 1.25),
    ("ulysses", True): ("heads", 1.10),
    ("ulysses", False): ("heads", 1.10),
    ("simple", True): ("naive", 1.5),
    ("simple", False): ("naive", 1.5),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One problem; B = 1."""

    length: int
    causal: bool
    backward: bool
    dtype: torch.dtype
    heads: int = 8
    head_dim: int = 64

    def __str__(self) -> str:
        mask = "causal" if self.causal else "full"
        direction = "forward+backward" if self.backward else "forward"
        return f"S={self.length} {mask} {direction} {str(self.dtype).removeprefix('torch.')}"


def cases(options: argparse.Namespace) -> Iterator[Case]:
    for length in options.lengths:
        for dtype in options.dtypes:
            for causal in (True, False):
                for backward in (False, True):
                    yield Case(
                        length=length,
                        causal=causal,
                        backward=backward,
                        dtype=getattr(torch, dtype),
                    )


# --- on each rank ---------------------------------------------------------------------------------


def _random(case: Case, tokens: int, heads: int, count: int = 4) -> list[Tensor]:
    made = [torch.randn(1, heads, tokens, case.head_dim).to(case.dtype) for _ in range(count)]
    return [x.requires_grad_(case.backward) for x in made[:-1]] + made[-1:]


def _stepping(attention: Callable[[], Tensor], dout: Tensor, leaves: Sequence[Tensor]) -> Any:
    def step() -> None:
        out = attention()
        if out.requires_grad:
            torch.autograd.grad(out, list(leaves), dout)

    return step


def _sdpa(case: Case, heads: int) -> Callable[[], None]:
    q, k, v, dout = _random(case, case.length, heads)
    attention = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=case.causal)  # noqa: E731
    step: Callable[[], None] = _stepping(attention, dout, (q, k, v))
    return step


def _split(case: Case, strategy: str, size: int) -> Callable[[], None]:
    q, k, v, dout = _random(case, case.length // size, case.heads)
    attention = lambda: ops.ring_attention(  # noqa: E731
        q, k, v, strategy=strategy, causal=case.causal, layout="zigzag", name="benchmark"
    )
    step: Callable[[], None] = _stepping(attention, dout, (q, k, v))
    return step


def _peer(case: Case, name: str, size: int) -> Callable[[], None]:
    q, k, v, dout = _random(case, case.length // size, case.heads)
    step: Callable[[], None] = _stepping(lambda: PEERS[name](q, k, v, case.causal), dout, (q, k, v))
    return step


def _naive(case: Case) -> Callable[[], None]:
    q, k, v, dout = _random(case, case.length, 1)

    def attention() -> Tensor:
        scores = q @ k.transpose(-1, -2) * case.head_dim**-0.5
        if case.causal:
            later = torch.ones(case.length, case.length, dtype=torch.bool).triu_(1)
            scores = scores.masked_fill(later, float("-inf"))
        return torch.softmax(scores, -1) @ v

    step = _stepping(attention, dout, (q, k, v))

    def every_head() -> None:
        for _ in range(case.heads):
            step()

    return every_head


def _rows(case: Case, rank: int, size: int) -> Callable[[], None]:
    """The rank's queries of a zigzag split against whole K and V, without any message."""
    layout = Layout("zigzag", case.length, size)
    q, _, _, dout = (x.detach() for x in _random(case, layout.local_length, case.heads))
    _, k, v, _ = (x.detach() for x in _random(case, case.length, case.heads))
    spec = AttentionSpec(
        scale=case.head_dim**-0.5,
        q_len=case.length,
        kv_len=case.length,
        keep=CAUSAL if case.causal else None,
    )
    problem = Problem(
        spec=spec,
        inputs=(),
        ranks=Ranks(rank, size, None, "rows"),
        layout="zigzag",
        kernel=kernel.CPU_FLASH,
        tiling=Tiling(masked=512),
        stats=stats.LayerStats(),
    )
    mine, keys = problem.q_runs(rank), (Run(0, 0, case.length),)

    def step() -> None:
        output = Output.empty(problem, q, case.head_dim)
        attend(problem, output, q, k, v, mine, keys)
        out, lse = output.finish()
        if case.backward:
            sums = Sums.empty(problem, q, k, v)
            out = out.to(q.dtype)
            attend_backward(problem, sums, dout, q, k, v, out, lse, mine, keys)
            sums.finish()

    return step


def _contestants(case: Case, rank: int, size: int) -> dict[str, Callable[[], None] | None]:
    """What this rank does for each; None where it only waits."""
    first = rank == 0
    return {
        "whole": _sdpa(case, case.heads) if first else None,
        "heads": _sdpa(case, case.heads // size),
        "rows": _rows(case, rank, size),
        **{strategy: _split(case, strategy, size) for strategy in STRATEGIES},
        **{name: _peer(case, name, size) for name in PEERS},
    }


def _timed(step: Callable[[], None] | None, threads: int) -> float:
    """Seconds of the slowest rank from a common start."""
    torch.set_num_threads(threads)
    dist.barrier()
    start = time.perf_counter()
    if step is not None:
        step()
    seconds = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    torch.set_num_threads(1)
    return float(seconds)


def _peak_bytes(step: Callable[[], None]) -> int:
    """Peak resident memory of a step above what was there before it, nothing kept from another."""
    step()
    POOL.clear()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    step()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {field} in /proc/self/status")


def _measure(
    case: Case, rank: int, size: int, options: argparse.Namespace
) -> dict[str, list[float]]:
    steps = _contestants(case, rank, size)
    if options.contestants:
        steps = {name: step for name, step in steps.items() if name in options.contestants}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for name, step in steps.items():
        _timed(step, size if name == "whole" else 1)
    for number in range(options.rounds):
        # The order turns with each round, so that none always follows the same one.
        names = list(steps)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            times[name].append(_timed(steps[name], size if name == "whole" else 1))
    if case.length <= options.naive_up_to and case.dtype == torch.float32:
        step = _naive(case) if rank == 0 else None
        times["naive"] = [_timed(step, 1) / size for _ in range(max(1, options.rounds // 3))]
    return times


def _rank_main(rank: int, size: int, port: int, options: argparse.Namespace, pipe: Any) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=size)
    if options.memory:
        case = Case(length=options.lengths[0], causal=True, backward=True, dtype=torch.float32)
        for strategy in options.strategies:
            peak = torch.tensor(_peak_bytes(_split(case, strategy, size)))
            dist.all_reduce(peak, op=dist.ReduceOp.MAX)
            if rank == 0:
                pipe.send((strategy, int(peak)))
    else:
        for case in cases(options):
            times = _measure(case, rank, size, options)
            if rank == 0:
                pipe.send((case, times))
    if rank == 0:
        pipe.send(None)
    dist.barrier()
    dist.destroy_process_group()


# --- the driver -----------------------------------------------------------------------------------


def _run(size: int, options: argparse.Namespace) -> Iterator[Any]:
    context = multiprocessing.get_context("spawn")
    if options.memory:
        # What is freed leaves the process at once: else a peak counts the allocator's holes too.
        os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    ours, theirs = context.Pipe()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        context.Process(target=_rank_main, args=(rank, size, port, options, theirs))
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    try:
        while True:
            if ours.poll(5):
                message = ours.recv()
                if message is None:
                    return
                yield message
            dead = [p.exitcode for p in ranks if p.exitcode not in (None, 0)]
            assert not dead, f"a rank ended with {dead}"
    finally:
        for process in ranks:
            process.join(10)
            process.kill()


def _row(case: Case, times: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    ratios: dict[str, Any] = {}
    for name, found in times.items():
        reference, largest = BARS.get((name, case.backward), ("heads", None))
        if reference not in times:
            continue
        base: Sequence[float] = times[reference]
        if reference == "naive":
            base = [statistics.median(base)] * len(found)
        each = [mine / other for mine, other in zip(found, base, strict=False)]
        ratios[name] = {
            "median_ms": round(1e3 * statistics.median(found), 2),
            "reference": reference,
            "ratio": round(statistics.median(each), 3),
            "quartiles": [round(x, 3) for x in _quartiles(each)],
            "bar": largest,
        }
    return {"case": str(case), "contestants": ratios}


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def _table(result: Mapping[str, Any]) -> Iterator[str]:
    """Ratios to (b) with quartiles, as Markdown."""
    shown = [
        name
        for name in result["rows"][0]["contestants"]
        if name not in ("heads", "naive", "simple")
    ]
    yield "| " + " | ".join(["", *shown]) + " |"
    yield "|---" * (len(shown) + 1) + "|"
    for row in result["rows"]:
        found = [row["contestants"][name] for name in shown]
        cells = [
            f"{x['ratio']:.2f} ({x['quartiles'][0]:.2f}-{x['quartiles'][1]:.2f})" for x in found
        ]
        yield "| " + " | ".join([row["case"], *cells]) + " |"


def _origin() -> dict[str, Any]:
    def command(*words: str) -> str:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    cpu = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    return {
        "date": datetime.date.today().isoformat(),
        "commit": command("git", "rev-parse", "--short", "HEAD"),
        "cpu": cpu[0].split(":")[1].strip() if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "torch": metadata.version("torch"),
        "python": platform.python_version(),
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--contestants", nargs="+", help="time these alone; 'heads', the reference, among them"
    )
    parser.add_argument("--naive-up-to", type=int, default=8192)
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--show", type=Path, help="print results of earlier runs as a table")
    return parser.parse_args()


def main() -> None:
    """Prints a line a case and writes all figures as JSON."""
    options = _options()
    if options.show is not None:
        print("\n".join(_table(json.loads(options.show.read_text()))))
        return
    origin, rows = _origin(), []
    what = "memory" if options.memory else "time"
    output = options.output or Path(__file__).parent / "results" / f"attention_{what}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    for size in options.ranks:
        for message in _run(size, options):
            if options.memory:
                row = {"ranks": size, "strategy": message[0], "peak_mb": round(message[1] / 1e6, 1)}
                print(f"{size} ranks  {row['strategy']:<12} {row['peak_mb']:7.1f} MB", flush=True)
            else:
                row = {"ranks": size, **_row(*message)}
                shown = "  ".join(
                    f"{name} {found['ratio']:.3f}" for name, found in row["contestants"].items()
                )
                print(f"{size} ranks  {row['case']:<46} {shown}", flush=True)
            rows.append(row)
            # Written at once: a long run that is cut off keeps what it has.
            output.write_text(json.dumps({**origin, "rows": rows}, indent=1) + "\n")
    print(output)


if __name__ == "__main__":
    main()
