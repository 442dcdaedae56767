"""The ring's tiles on one device, ranks simulated: ``python -m benchmarks.attention_schedule``.

Each of p zigzag ranks in turn meets all blocks hop by hop, as in the ring, but on one device and
without links: compute, merges and launches only. Shown is its throughput as a share of the single
fused kernel's on the whole sequence (causal, p x tokens-per-rank long), forward and forward with
backward. It is the bound of what a ring with perfect links would reach, not a ring's speed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

from ringfx.comm import stats
from ringfx.comm.process_group import Ranks
from ringfx.ir.attention_spec import AttentionSpec
from ringfx.ir.layout import Layout
from ringfx.ir.tiles import CAUSAL, Expr
from ringfx.ops.kernels import kernel
from ringfx.ops.tiling.attention_call import Problem
from ringfx.ops.tiling.merge import Output, Sums, attend, attend_backward
from ringfx.ops.tiling.pieces import Tiling

__all__ = ["Ring", "simulate"]

Tensor = torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Ring:
    """A ring of simulated ranks over whole q, k, v [B, H, S, D]; S divides into 2p chunks."""

    size: int
    keep: Expr | None = CAUSAL

    def problem(self, rank: int, q: Tensor) -> Problem:
        length = q.shape[2]
        return Problem(
            spec=AttentionSpec(
                scale=q.shape[3] ** -0.5, q_len=length, kv_len=length, keep=self.keep
            ),
            inputs=(),
            ranks=Ranks(rank, self.size, None, "simulated"),
            layout="zigzag",
            kernel=kernel.choose(q.device, q.dtype),
            tiling=Tiling(masked=512),
            stats=stats.LayerStats(),
        )

    def tokens(self, x: Tensor, rank: int) -> Tensor:
        positions = Layout("zigzag", x.shape[2], self.size).positions(rank, x.device)
        return x[:, :, positions]


def simulate(ring: Ring, q: Tensor, k: Tensor, v: Tensor, dout: Tensor | None) -> list[Tensor]:
    """Output, and with ``dout`` dq, dk, dv, of all ranks, over the whole sequence.

    As in the ring, each owner adds the shares of its dk and dv in the accumulation dtype.
    """
    shards = [[ring.tokens(x, rank) for x in (q, k, v)] for rank in range(ring.size)]
    outputs: list[tuple[Tensor, Tensor]] = []
    for rank in range(ring.size):
        problem = ring.problem(rank, q)
        output = Output.empty(problem, shards[rank][0], v.shape[3])
        for hop in range(ring.size):
            owner = (rank - hop) % ring.size
            q_runs, k_runs = problem.q_runs(rank), problem.k_runs(owner)
            _, k_there, v_there = shards[owner]
            attend(problem, output, shards[rank][0], k_there, v_there, q_runs, k_runs)
        outputs.append(output.finish())
    found = [[out.to(q.dtype)] for out, _ in outputs]
    if dout is not None:
        sums = [Sums.empty(ring.problem(r, q), *shards[r]) for r in range(ring.size)]
        for rank in range(ring.size):
            problem, (q_local, _, _) = ring.problem(rank, q), shards[rank]
            d_local, (out,), lse = ring.tokens(dout, rank), found[rank], outputs[rank][1]
            for hop in range(ring.size):
                owner = (rank - hop) % ring.size
                q_runs, k_runs = problem.q_runs(rank), problem.k_runs(owner)
                _, k_there, v_there = shards[owner]
                part = Sums(sums[rank].dq, sums[owner].dk, sums[owner].dv, ())
                attend_backward(
                    problem, part, d_local, q_local, k_there, v_there, out, lse, q_runs, k_runs
                )
        for rank, total in enumerate(sums):
            done = total.finish()
            found[rank] += [x.to(q.dtype) for x in (done.dq_BHQD, done.dk_BGKD, done.dv_BGKE)]
    order = Layout("zigzag", q.shape[2], ring.size).order(q.device)
    return [torch.cat(parts, 2)[:, :, order] for parts in zip(*found, strict=True)]


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _whole(q: Tensor, k: Tensor, v: Tensor, dout: Tensor | None) -> None:
    if dout is None:
        F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.autograd.grad(out, (q, k, v), dout)


def main() -> None:
    """Prints percent of the single kernel's throughput, medians over alternating rounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384, 32768, 65536])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    device, ring, rows = torch.device(options.device), Ring(size=options.ranks), []
    for tokens in options.tokens:
        shape = (1, options.heads, tokens * options.ranks, options.head_dim)
        q, k, v, dout = torch.randn(4, *shape, dtype=getattr(torch, options.dtype), device=device)
        for gradient in (None, dout):
            ratios = []
            for _ in range(options.rounds + 1):
                single = _seconds(partial(_whole, q, k, v, gradient), device)
                tiled = _seconds(partial(simulate, ring, q, k, v, gradient), device)
                ratios.append(single / tiled)
            percent = round(100 * statistics.median(ratios[1:]), 1)
            name = "forward" if gradient is None else "forward+backward"
            rows.append({"tokens_per_rank": tokens, "what": name, "percent": percent})
            print(f"{tokens} tokens a rank, {name}: {percent}% of the single kernel", flush=True)
    origin = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "what": "kernel-only bound: simulated ranks move no data",
    }
    if options.output:
        options.output.write_text(json.dumps({**origin, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
