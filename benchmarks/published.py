"""Published steps of long-context training beside predictions: ``python -m benchmarks.published``.

Each row of ``published_jobs.json`` is a job that others ran and described: model, GPUs, tokens, how
it was parallelised, and a figure. Its plan is made from a published profile of the device; no
constant was fitted to any row. Sources are named by the letters of ``SOURCES``.

What the plan cannot know is said for each row. A job that computes everything again runs attention
forward once more: its time is added here, since a plan of ringfx runs attention once.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from torch import nn

import ringfx
from benchmarks.memory import _origin as origin
from ringfx.api import offline
from ringfx.cost_model import Profile, load_profile
from ringfx.ir.step_time import OPTIMIZER

FILE = Path(__file__).parent / "published_jobs.json"
RESULTS = Path(__file__).parent / "results" / "published.json"
TARGETS = {"median error": 0.20, "rank correlation": 0.95}
SOURCES: Mapping[str, str] = {
    "A": "huggingface.co/docs/trl/long_context_training; transformers PR 48324; trl PR 6845, 6846",
    "B": "huggingface.co/blog/ulysses-sp",
    "G": "pytorch/torchtitan benchmarks/llama3_h100_202412_torchtitan.md",
    "I": "InternLM/xtuner docs/zh_cn/acceleration/benchmark.rst",
    "J": "mosaicml/llm-foundry scripts/train/benchmarking/README.md",
    "K": "jzhang38/EasyContext README.md",
    "L": "arXiv 2602.21196, second-hand",
    "M": "arXiv 2410.02660, table 9",
}
K, M = 2**10, 2**20
FP8_GFLOPS = 1_402_600
"""Of products in fp8 on the H100: ml-engineering by S. Bekman, compute/accelerator."""


def _qwen3(hidden: int, inner: int, layers: int, heads: int, *, tied: bool = False) -> Any:
    return hf.Qwen3Config(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=8, head_dim=128, vocab_size=151_936,
        max_position_embeddings=8 * M, tie_word_embeddings=tied,
    )  # fmt: skip


def _llama(hidden: int, inner: int, layers: int, heads: int, kv: int, vocabulary: int) -> Any:
    return hf.LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv, vocab_size=vocabulary,
        max_position_embeddings=8 * M,
    )  # fmt: skip


def _neox(hidden: int, layers: int, heads: int) -> Any:
    """MPT's sizes and its plain MLP, with rotary positions."""
    return hf.GPTNeoXConfig(
        hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=heads, vocab_size=50_368, max_position_embeddings=M,
        use_parallel_residual=False, hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip


MODELS: Mapping[str, Callable[[], Any]] = {
    "Qwen3-0.6B": lambda: _qwen3(1024, 3072, 28, 16, tied=True),
    "Qwen3-4B": lambda: _qwen3(2560, 9728, 36, 32, tied=True),
    "Qwen3-8B": lambda: _qwen3(4096, 12_288, 36, 32),
    "Qwen3-32B": lambda: _qwen3(5120, 25_600, 64, 64),
    "Llama3-8B": lambda: _llama(4096, 14_336, 32, 32, 8, 128_256),
    "Llama2-7B": lambda: _llama(4096, 11_008, 32, 32, 32, 32_000),
    "Llama2-70B": lambda: _llama(8192, 28_672, 80, 64, 8, 32_000),
    "MPT-7B": lambda: _neox(4096, 32, 32),
    "MPT-13B": lambda: _neox(5120, 40, 40),
    "Yi-34B": lambda: _llama(7168, 20_480, 60, 56, 8, 64_000),
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A published job; ``figure`` is seconds a step, or tokens a second of a GPU or of the job."""

    number: int
    """In the list that the rows come from."""
    model: str
    gpus: int
    tokens: int
    """Of one sequence."""
    sequences: float
    """Of a step of the whole job."""
    ranks: int
    """That share a sequence."""
    figure: float
    unit: str
    source: str
    device: str = "h100"
    strategy: str = "production"
    kernel: str = ""
    """Attention's kernel; empty: the fastest of the profile."""
    full_recompute: bool = True
    fp8: bool = False
    compiled: bool = False
    """Whether the source says that torch.compile, or another compiler, fused its operators."""
    peak_gb: float | None = None
    """Of a GPU, where layer inputs were offloaded."""
    doubt: str = ""
    """What differs from the plan, as far as it is known."""

    @property
    def seconds(self) -> float:
        """Of a step."""
        if self.unit == "s":
            return self.figure
        job = self.figure * (self.gpus if self.unit == "t/s/GPU" else 1)
        return self.tokens * self.sequences / job


def jobs() -> list[Job]:
    return [Job(**fields) for fields in json.loads(FILE.read_text())]


def profile_of(job: Job) -> Profile:
    """The published profile, with the kernel and the products of the job."""
    found = load_profile(f"{job.device}-sxm-published", device="cuda")
    if job.kernel:
        kernels = tuple(row for row in found.kernels if row.kernel in (job.kernel, "math"))
        found = replace(found, kernels=kernels, fused_kernel=job.kernel)
    if job.fp8:
        rows = tuple(
            replace(row, gflops=FP8_GFLOPS) if row.dtype == "bfloat16" else row
            for row in found.products
        )
        found = replace(found, products=rows)
    return found


def planned(job: Job, **options: Any) -> ringfx.Plan:
    with offline():
        model: nn.Module = hf.AutoModelForCausalLM.from_config(MODELS[job.model]())
        model = model.to(torch.bfloat16)
        ids = torch.empty(1, job.tokens, dtype=torch.int64)
    states: bool | int = job.ranks > 1 and (job.gpus if job.gpus > job.ranks else True)
    profile: Any = profile_of(job)
    return ringfx.plan(
        model, (), {"input_ids": ids, "labels": ids, "use_cache": False}, world_size=job.ranks,
        profile=profile, strategy=job.strategy if job.ranks > 1 else "auto",
        optimizer="adamw", shard_states=states,
        compiler="inductor" if job.compiled else "aot_eager", **options,
    )  # fmt: skip


def predicted(job: Job) -> Mapping[str, Any]:
    """Seconds of a step, and a rank's peak of memory."""
    plan = planned(job, recompute="layers" if job.full_recompute else "none")
    assert plan.step is not None
    assert plan.step_ms is not None
    again = sum(x.forward_ms for x in plan.layers) if job.full_recompute else 0.0
    optimizer = plan.step.of(OPTIMIZER)
    micro = job.sequences / (job.gpus / job.ranks)
    step = max(micro, 1.0) * (plan.step_ms + again - optimizer) + optimizer
    return {
        "seconds": step / 1e3,
        "attention": max(micro, 1.0) * (plan.total_ms + again) / 1e3,
        "peak_gib": plan.memory.peak_bytes / 2**30,
    }


def peak_parts(job: Job) -> Mapping[str, float]:
    """GB of a rank by cause, with everything computed again and layer inputs offloaded."""
    plan = planned(job, recompute="attention", offload="all")
    return {part.cause: part.bytes / 1e9 for part in plan.memory.parts}


def compare_peaks(console: Console, output: Path) -> int:
    """Predicted peaks beside the published ones."""
    rows = []
    for job in jobs():
        if job.peak_gb is None:
            continue
        parts = peak_parts(job)
        error = sum(parts.values()) / job.peak_gb - 1
        rows.append(asdict(job) | {"parts_gb": parts, "error": error})
        largest = sorted(((size, name) for name, size in parts.items()), reverse=True)[:3]
        console.print(
            f"{job.number}: {job.model}, {job.tokens:,} tokens: published {job.peak_gb:.1f} GB, "
            f"predicted {sum(parts.values()):.1f} ({error:+.0%}); "
            + ", ".join(f"{name} {size:.1f}" for size, name in largest)
        )
    output.write_text(json.dumps({"sources": SOURCES, "rows": rows, **origin()}, indent=1) + "\n")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", type=int, nargs="+", default=[])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--peaks", action="store_true", help="of memory, not seconds")
    options = parser.parse_args()
    console = Console(width=140)
    if options.peaks:
        return compare_peaks(console, RESULTS.with_name("published_peaks.json"))
    rows: list[dict[str, Any]] = []
    for job in jobs():
        if options.only and job.number not in options.only:
            continue
        started = time.perf_counter()
        found = predicted(job)
        took = time.perf_counter() - started
        error = found["seconds"] / job.seconds - 1
        rows.append(asdict(job) | {"published": job.seconds, **found, "error": error})
        console.print(
            f"{job.number}: {job.model}, {job.gpus} {job.device}, {job.tokens:,} tokens: published "
            f"{job.seconds:.1f} s, predicted {found['seconds']:.1f} s ({error:+.0%}), of it "
            f"attention {found['attention']:.1f}; planned in {took:.0f} s"
        )
    result = {"targets": TARGETS, "sources": SOURCES, **summary(rows), "rows": rows, **origin()}
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    show(rows, console)
    return 0


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    errors = [abs(row["error"]) for row in rows]
    both = [[row["seconds"] for row in rows], [row["published"] for row in rows]]
    return {
        "jobs": len(rows),
        "median error": statistics.median(errors),
        "worst error": max(errors),
        "mean of log ratios": statistics.mean(math.log(1 + row["error"]) for row in rows),
        "rank correlation": float(spearmanr(*both).statistic) if len(rows) > 2 else 1.0,
    }


def show(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    table = Table(
        "job", "model", "GPUs", "tokens", "published s", "predicted s", "error", "differs"
    )
    for row in rows:
        table.add_row(
            str(row["number"]), row["model"], f"{row['gpus']} {row['device']}",
            f"{row['tokens']:,}", f"{row['published']:.1f}", f"{row['seconds']:.1f}",
            f"{row['error']:+.0%}", row["doubt"],
        )  # fmt: skip
    console.print(table)
    console.print(summary(rows))


if __name__ == "__main__":
    raise SystemExit(main())
