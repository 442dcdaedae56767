"""The ring over a slow link: ``python -m benchmarks.slow_link`` (Linux, root, iproute2).

Two ranks live in two network namespaces joined by a veth pair whose rate ``tc tbf`` bounds in both
directions, so every byte between them pays. The measured time of production is compared with the
bound of its own schedule, from terms measured in the same run:

    forward    max(tile 0, K/V transfer) + tile 1
    backward   max(tile 0, K/V transfer) + tile 1 + dK/dV transfer

Splitting a hop into head groups may beat it. Collective is shown beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ringfx import ops
from ringfx.comm import stats
from ringfx.comm.process_group import Ranks
from ringfx.ir.attention_spec import AttentionSpec
from ringfx.ir.tiles import CAUSAL
from ringfx.ops.kernels import kernel
from ringfx.ops.tiling.attention_call import Problem
from ringfx.ops.tiling.merge import Output, Sums, attend, attend_backward
from ringfx.ops.tiling.pieces import Tiling

Tensor = torch.Tensor
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 29511
NUM_RANKS = 2


@contextlib.contextmanager
def _link(rate: str) -> Iterator[tuple[str, str]]:
    """Two namespaces joined by a link of that rate, such as ``1gbit``; taken down at the end."""
    names = (f"ringfx{os.getpid()}a", f"ringfx{os.getpid()}b")
    devices = ("rfxveth0", "rfxveth1")

    def run(*words: str) -> None:
        subprocess.run(words, check=True)

    try:
        for name in names:
            run("ip", "netns", "add", name)
        run("ip", "link", "add", devices[0], "type", "veth", "peer", "name", devices[1])
        for name, device, address in zip(names, devices, ADDRESSES, strict=True):
            run("ip", "link", "set", device, "netns", name)
            inside = ("ip", "netns", "exec", name)
            run(*inside, "ip", "addr", "add", f"{address}/24", "dev", device)
            run(*inside, "ip", "link", "set", device, "up")
            run(*inside, "ip", "link", "set", "lo", "up")
            limit = ("rate", rate, "burst", "256kb", "latency", "50ms")
            run(*inside, "tc", "qdisc", "add", "dev", device, "root", "tbf", *limit)
        yield names
    finally:
        for name in names:
            subprocess.run(("ip", "netns", "del", name), check=False)


def _slowest(work: Callable[[], object]) -> float:
    dist.barrier()
    start = time.perf_counter()
    work()
    seconds = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds)


def _median(rounds: int, work: Callable[[], object]) -> float:
    _slowest(work)
    return statistics.median(_slowest(work) for _ in range(rounds))


def _terms(length: int, heads: int, head_dim: int, rounds: int) -> dict[str, float]:
    """Seconds of each tile and each transfer on its own, on the slowest rank."""
    rank = dist.get_rank()
    q, k, v, dout = torch.randn(4, 1, heads, length // NUM_RANKS, head_dim)
    problem = Problem(
        spec=AttentionSpec(scale=head_dim**-0.5, q_len=length, kv_len=length, keep=CAUSAL),
        inputs=(),
        ranks=Ranks(rank, NUM_RANKS, dist.group.WORLD, "slow link"),
        layout="zigzag",
        kernel=kernel.CPU_FLASH,
        tiling=Tiling(masked=512),
        stats=stats.LayerStats(),
    )
    out, lse = Output.empty(problem, q, head_dim).finish()
    found = {}
    for hop in range(NUM_RANKS):
        runs = problem.q_runs(rank), problem.k_runs((rank - hop) % NUM_RANKS)

        def forward(runs: Any = runs) -> None:
            attend(problem, Output.empty(problem, q, head_dim), q, k, v, *runs)

        def backward(runs: Any = runs) -> None:
            sums = Sums.empty(problem, q, k, v)
            attend_backward(problem, sums, dout, q, k, v, out, lse.fill_(5.0), *runs)
            sums.finish()

        found[f"forward tile {hop}"] = _median(rounds, forward)
        found[f"backward tile {hop}"] = _median(rounds, backward)
    block = torch.cat([k.reshape(-1), v.reshape(-1)])
    other = 1 - rank

    def transfer() -> None:
        problem.ranks.exchange(
            "benchmark", send=block, to=other, receive=torch.empty_like(block), source=other
        ).wait()

    found["transfer"] = _median(max(3, rounds // 2), transfer)
    return found


def _measured(
    strategy: str, backward: bool, length: int, heads: int, head_dim: int, rounds: int
) -> float:
    q, k, v, dout = torch.randn(4, 1, heads, length // NUM_RANKS, head_dim)
    leaves = [x.requires_grad_(backward) for x in (q, k, v)]

    def step() -> None:
        out = ops.ring_attention(*leaves, strategy=strategy, causal=True, layout="zigzag")
        if backward:
            torch.autograd.grad(out, leaves, dout)

    return _median(rounds, step)


def _rank_main(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = f"rfxveth{options.rank}"
    address = f"tcp://{ADDRESSES[0]}:{PORT}"
    dist.init_process_group("gloo", init_method=address, rank=options.rank, world_size=NUM_RANKS)
    for length in options.lengths:
        size = (length, options.heads, options.head_dim, options.rounds)
        terms = _terms(*size)
        forward = max(terms["forward tile 0"], terms["transfer"]) + terms["forward tile 1"]
        backward = max(terms["backward tile 0"], terms["transfer"]) + terms["backward tile 1"]
        bounds = {"forward": forward, "forward+backward": forward + backward + terms["transfer"]}
        for what, bound in bounds.items():
            with_backward = what != "forward"
            row = {
                "length": length,
                "what": what,
                "bound_ms": 1e3 * bound,
                "production_ms": 1e3 * _measured("production", with_backward, *size),
                "collective_ms": 1e3 * _measured("collective", with_backward, *size),
                "terms_ms": {name: round(1e3 * seconds, 2) for name, seconds in terms.items()},
            }
            row["production_over_bound"] = row["production_ms"] / bound / 1e3
            if options.rank == 0:
                print(json.dumps(row), flush=True)
    dist.destroy_process_group()


def _run(rate: str, arguments: list[str]) -> list[dict[str, Any]]:
    with _link(rate) as names:
        module = ("-W", "ignore", "-m", "benchmarks.slow_link")
        ranks = [
            subprocess.Popen(
                ("ip", "netns", "exec", name, sys.executable, *module, "--rank", rank, *arguments),
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank, name in zip("01", names, strict=True)
        ]
        printed, _ = ranks[0].communicate()
        ranks[1].communicate()
    failed = [process.returncode for process in ranks if process.returncode]
    assert not failed, f"a rank ended with {failed}"
    return [json.loads(line) for line in printed.splitlines() if line.startswith("{")]


def _words(row: Mapping[str, Any]) -> str:
    return (
        f"{row['rate']} S={row['length']} {row['what']:<17} "
        f"production {row['production_ms']:.0f} ms = {row['production_over_bound']:.2f} x its "
        f"bound; collective {row['collective_ms']:.0f} ms"
    )


def main() -> None:
    """Prints, for each rate and length, measured time over the schedule's bound."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rates", nargs="+", default=["1gbit", "100mbit"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    results = Path(__file__).parent / "results" / "slow_link.json"
    parser.add_argument("--output", type=Path, default=results)
    options = parser.parse_args()
    if options.rank is not None:
        _rank_main(options)
        return
    arguments = ["--rounds", str(options.rounds), "--heads", str(options.heads)]
    arguments += ["--head-dim", str(options.head_dim)]
    arguments += ["--lengths", *map(str, options.lengths)]
    rows = []
    for rate in options.rates:
        for row in _run(rate, arguments):
            rows.append({"rate": rate, **row})
            print(_words(rows[-1]), flush=True)
    origin = {
        "date": datetime.date.today().isoformat(),
        "rounds": options.rounds,
        "host_cores": os.cpu_count(),
        "machine": os.uname().machine,
        "torch": torch.__version__,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({**origin, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
