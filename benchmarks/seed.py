"""The seed's experiment, repeated: ``python -m benchmarks.seed [--device cuda --dtype float16]``.

The seed compared three implementations on one GTX 1080 (one rank, forward without gradient,
float16, batch 1, 8 heads of 64): a dense attention and two that are dilated with segments 1024,
2048, 4096 and rates 1, 2, 4. Here each strategy computes both functions, on one rank and on two,
and the seed's table stands beside ours.

Comparable: ratios between strategies of one function, and which of them runs out of memory.
Not comparable: milliseconds and MiB (another device), and the seed's columns with each other (they
are three different functions, and none was distributed).

A time is that of the slowest rank from a common start, the median over rounds in which all
contestants take turns. Memory is what one call allocates at most beside q, k and v.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarks.memory import _origin as origin
from benchmarks.prediction_memory import peak_bytes
from ringfx import ops
from ringfx.comm.local_ranks import LocalRanks

RESULTS = Path(__file__).parent / "results" / "seed_experiment.json"
LENGTHS = (4096, 8192, 16384)
STRATEGIES = ("simple", "collective", "production")
SEGMENTS, RATES = (1024, 2048, 4096), (1, 2, 4)
HEADS, HEAD_DIM = 8, 64
SEED_MS: Mapping[str, tuple[float | None, ...]] = {
    "simple": (763.7, 4199.2, None),
    "collective": (675.5, 1302.1, 2751.8),
    "production": (558.0, 756.8, 1421.0),
}
SEED_MIB: Mapping[str, tuple[float | None, ...]] = {
    "simple": (532.1, 2080.1, None),
    "collective": (29.3, 53.7, 102.2),
    "production": (224.7, 445.2, 882.2),
}
"""At 4096, 8192, 16384 tokens; None ran out of memory. The seed prints 2048 MB for simple at 8192,
against its own ratio and formula: 2080.1."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One function at one size, as all ranks compute it."""

    length: int
    dilated: bool
    backward: bool
    causal: bool
    dtype: str
    device: str
    rounds: int


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One strategy in one case."""

    ranks: int
    strategy: str
    seconds: list[float]
    """Of each round, of the slowest rank."""
    peak_bytes: int
    """Of the rank that allocates most."""


def measured(case: Case) -> list[Measured]:
    """All strategies in turns, on this rank."""
    size = dist.get_world_size()
    calls = {strategy: prepared(case, strategy) for strategy in STRATEGIES}
    peaks = {strategy: _largest(peak(call, case)) for strategy, call in calls.items()}
    seconds: dict[str, list[float]] = {strategy: [] for strategy in STRATEGIES}
    for number in range(case.rounds):
        order = STRATEGIES[number % 3 :] + STRATEGIES[: number % 3]
        for strategy in order:
            seconds[strategy].append(timed(calls[strategy], case))
    return [
        Measured(ranks=size, strategy=s, seconds=seconds[s], peak_bytes=round(peaks[s]))
        for s in STRATEGIES
    ]


def prepared(case: Case, strategy: str) -> Callable[[], None]:
    """One call on this rank's share of random tensors."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    shape = (1, HEADS, case.length // dist.get_world_size(), HEAD_DIM)
    dtype = getattr(torch, case.dtype)
    q, k, v = (
        torch.randn(shape, generator=generator).to(case.device, dtype).requires_grad_(case.backward)
        for _ in range(3)
    )

    def call() -> None:
        with torch.set_grad_enabled(case.backward):
            if case.dilated:
                out = ops.dilated_attention(
                    q, k, v, segment_lengths=SEGMENTS, dilation_rates=RATES, causal=case.causal,
                    strategy=strategy, name=f"dilated {strategy}",
                )  # fmt: skip
            else:
                layout = "zigzag" if case.causal else "contiguous"
                out = ops.ring_attention(
                    q, k, v, causal=case.causal, strategy=strategy, layout=layout,
                    name=f"dense {strategy}",
                )  # fmt: skip
        if case.backward:
            out.backward(torch.ones_like(out))
            q.grad = k.grad = v.grad = None

    return call


def peak(call: Callable[[], None], case: Case) -> int:
    call()
    if case.device == "cpu":
        return peak_bytes(call)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return int(torch.cuda.max_memory_allocated() - before)


def timed(call: Callable[[], None], case: Case) -> float:
    dist.barrier()
    begin = time.perf_counter()
    call()
    if case.device == "cuda":
        torch.cuda.synchronize()
    return _largest(time.perf_counter() - begin)


def _largest(value: float) -> float:
    found = torch.tensor(float(value), dtype=torch.float64)
    if dist.get_backend() == "nccl":
        found = found.cuda()
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)


def main() -> int:
    options = _options()
    console = Console(width=110)
    rows: list[dict[str, Any]] = []
    for num_ranks in options.ranks:
        with LocalRanks(num_ranks, device=options.device) as ranks:
            for length in options.lengths:
                for dilated in (False, True):
                    case = Case(
                        length=length, dilated=dilated, backward=options.backward,
                        causal=options.causal, dtype=options.dtype, device=options.device,
                        rounds=options.rounds,
                    )  # fmt: skip
                    for found in ranks.run(measured, case)[0]:
                        rows.append(asdict(case) | asdict(found))
                        console.print(_line(rows[-1]), highlight=False)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    what = " ".join(__doc__.split("\n\n")[1].split())
    options.output.write_text(json.dumps({"what": what, "rows": rows, **origin()}, indent=1) + "\n")
    console.print(table(rows))
    console.print(f"Written to {options.output}.", highlight=False)
    return 0


def _line(row: Mapping[str, Any]) -> str:
    name = "dilated" if row["dilated"] else "dense"
    ms = 1e3 * statistics.median(row["seconds"])
    return (
        f"{row['length']:,} tokens, {name}, {row['strategy']}, {row['ranks']} ranks: {ms:,.1f} ms, "
        f"{row['peak_bytes'] / 2**20:,.1f} MiB"
    )


def table(rows: list[dict[str, Any]]) -> Table:
    """The seed's ratios to collective, and ours of both functions."""
    found = Table(title="relative to collective: time, memory")
    for name in ("tokens", "strategy", "seed"):
        found.add_column(name)
    columns = sorted({(row["dilated"], row["ranks"]) for row in rows})
    for dilated, ranks in columns:
        found.add_column(f"{'dilated' if dilated else 'dense'}, {ranks} rank{'s'[: ranks > 1]}")
    for i, length in enumerate(LENGTHS):
        for strategy in STRATEGIES:
            cells = [_ratios(rows, length, strategy, *column) for column in columns]
            if any(cells):
                found.add_row(f"{length:,}", strategy, _seed_ratio(strategy, i), *cells)
    return found


def _seed_ratio(strategy: str, i: int) -> str:
    ms, mib = SEED_MS[strategy][i], SEED_MIB[strategy][i]
    if ms is None or mib is None:
        return "out of memory"
    base_ms, base_mib = SEED_MS["collective"][i], SEED_MIB["collective"][i]
    assert base_ms is not None
    assert base_mib is not None
    return f"{ms / base_ms:.2f}, {mib / base_mib:.2f}"


def _ratios(
    rows: list[dict[str, Any]], length: int, strategy: str, dilated: bool, ranks: int
) -> str:
    here = [
        r for r in rows
        if (r["length"], r["dilated"], r["ranks"]) == (length, dilated, ranks)
    ]  # fmt: skip
    by_name = {r["strategy"]: r for r in here}
    if strategy not in by_name:
        return ""
    mine, base = by_name[strategy], by_name["collective"]
    pairs = zip(mine["seconds"], base["seconds"], strict=True)
    time_ratio = statistics.median(a / b for a, b in pairs)
    return f"{time_ratio:.2f}, {mine['peak_bytes'] / max(1, base['peak_bytes']):.2f}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.seed", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", help="float16, bfloat16, float32")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backward", action="store_true", help="measure training, not inference")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
