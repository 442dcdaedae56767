"""How long plans take on a small machine: ``python -m benchmarks.planning``.

Each plan is made through the command, as a user makes it: a large model on many ranks, a budget
that nothing fits, a page, the longest sequence of a saved plan. Measured are wall and CPU seconds
and the largest resident memory of the process. On a machine that others share, wall time is an
upper bound.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.memory import _origin as origin

RESULTS = Path(__file__).parent / "results" / "planning.json"
MOST_SECONDS, MOST_BYTES = 60.0, 3e9
"""Of the processor, and resident."""
MOST_BESIDE_A_PLAN = 5.0
"""Seconds of the processor that a budget takes that nothing fits, beyond one that fits."""


def _llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> str:
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 1 << 20,
        "torch_dtype": "bfloat16",
        "use_cache": False,
    }
    return json.dumps(config)


OWN = """
import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention, silu


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.gate, self.down = (
            nn.Linear(a * width, b * width) for a, b in ((1, 3), (1, 3), (3, 1))
        )

    def forward(self, x):
        q, k, v = self.qkv(self.first(x)).unflatten(-1, (3, 8, -1)).permute(2, 0, 3, 1, 4)
        made = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(made.transpose(1, 2).flatten(2))
        y = self.second(x)
        return x + self.down(silu(self.gate(y)) * self.up(y))


class Own(nn.Module):
    def __init__(self, width=512, layers=32, words=32_000):
        super().__init__()
        self.words, self.head = nn.Embedding(words, width), nn.Linear(width, words)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))

    def forward(self, ids, labels):
        logits = self.head(self.blocks(self.words(ids)))
        return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def make(seq_len):
    ids = torch.zeros(1, seq_len, dtype=torch.long)
    return Own(), (ids, ids)
"""

FILES: Mapping[str, str] = {
    "7b.json": _llama(4096, 11008, 32, 32, 32, 32_000),
    "8b.json": _llama(4096, 14_336, 32, 32, 8, 128_256),
    "70b.json": _llama(8192, 28_672, 80, 64, 8, 128_256),
    "own.py": OWN,
}
"""What is planned: configurations of Hugging Face, and a model of one's own."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A plan by its command."""

    what: str
    words: str
    fits: bool = True

    def command(self, folder: Path) -> list[str]:
        target, *words = self.words.split()
        return [sys.executable, "-m", "ringfx", "plan", str(folder / target), *words]


H100 = "--profile h100-sxm-published"
SHARED = f"--dtype bfloat16 --optimizer adamw --shard-states --gpu-memory 80GB {H100}"
"""AdamW's moments in bfloat16, as the parameters."""
MIXED = f"--optimizer adamw --param-dtype bfloat16 --shard-states --gpu-memory 80GB {H100}"
"""Float32 parameters and moments, gathered in bfloat16."""

JOBS = (
    Job(
        what="Llama-3-70B, 1,048,576 tokens, 1,024 ranks",
        words="70b.json --seq-len 1M --world-size 1024 --dtype bfloat16 --optimizer adamw "
        f"--gpu-memory 640GiB {H100}",
    ),
    Job(
        what="Llama-3-70B, 262,144 tokens, 32 ranks, states in float32",
        words=f"70b.json --seq-len 256k --world-size 32 {MIXED}",
    ),
    Job(
        what="Llama-3-8B, 1,048,576 tokens, 8 ranks",
        words=f"8b.json --seq-len 1M --world-size 8 {SHARED}",
    ),
    Job(
        what="Llama-2-7B, 262,144 tokens, 8 ranks, with its page",
        words=f"7b.json --seq-len 256k --world-size 8 {SHARED} --html page.html",
    ),
    *(
        Job(
            what=f"the longest sequence of Llama-3-8B, {ranks} rank{'s' if ranks > 1 else ''}",
            words=f"8b.json --seq-len 64k --world-size {ranks} {SHARED} --max-seq-len",
        )
        for ranks in (1, 8, 32)
    ),
    Job(
        what="32 layers of one's own, 131,072 tokens, 8 ranks",
        words=f"own.py:make --seq-len 128k --world-size 8 --gpu-memory 80GB {H100}",
    ),
    Job(
        what="the same in 1.5 GB, which nothing fits",
        words=f"own.py:make --seq-len 128k --world-size 8 --gpu-memory 1.5GB {H100}",
        fits=False,
    ),
)


def main() -> int:
    """Prints and writes what it took; 1 if that was too much."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="jobs whose name has this in it")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, text in FILES.items():
            (Path(folder) / name).write_text(text)
        rows = [_run(job, Path(folder)) for job in JOBS if options.only in job.what]
    result = {
        "what": "planning, by the command line",
        "rows": rows,
        "limits": {
            "seconds": MOST_SECONDS,
            "bytes": MOST_BYTES,
            "seconds beyond a plan that fits": MOST_BESIDE_A_PLAN,
        },
        **origin(),
    }
    if not options.only:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    _print(rows)
    missed = _missed(rows)
    for text in missed:
        print(f"MISSED: {text}")
    return int(bool(missed))


def _run(job: Job, folder: Path) -> Mapping[str, Any]:
    start, load = time.perf_counter(), os.getloadavg()[0]
    with subprocess.Popen(
        job.command(folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        cwd=folder, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        text = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if (process.returncode == 0) != job.fits:
        raise RuntimeError(f"{job.what}: {text}")
    return {
        "what": job.what,
        "command": f"ringfx plan {job.words}",
        "wall_seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_resident_bytes": used.ru_maxrss * 1024,
        "load_before": load,
        "answer": _answer(text, job),
    }


def _answer(text: str, job: Job) -> str:
    """The lines that say whether it fits, or what would."""
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    words = ("Fits", "Takes", "longest") if job.fits else ("no choice", "Do", "shard", "tokens")
    found = [x for x in lines if any(word in x for word in words)]
    return " ".join((found or lines)[:3])[:400]


def _missed(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The limits that were not kept, in words."""
    texts = [
        f"{row['what']}: {row['cpu_seconds']} s, {row['peak_resident_bytes']} bytes"
        for row in rows
        if row["cpu_seconds"] > MOST_SECONDS or row["peak_resident_bytes"] > MOST_BYTES
    ]
    seconds = {row["what"]: row["cpu_seconds"] for row in rows}
    fits, refused = JOBS[-2].what, JOBS[-1].what
    if {fits, refused} <= seconds.keys():
        beyond = seconds[refused] - seconds[fits]
        if beyond > MOST_BESIDE_A_PLAN:
            texts.append(f"{refused}: {beyond:.1f} s beyond a plan that fits")
    return texts


def _print(rows: Sequence[Mapping[str, Any]]) -> None:
    table = Table("plan", "wall, s", "processor, s", "GB", "answer")
    for row in rows:
        size = row["peak_resident_bytes"] / 1e9
        seconds = f"{row['wall_seconds']}", f"{row['cpu_seconds']}"
        table.add_row(row["what"], *seconds, f"{size:.2f}", row["answer"])
    Console(width=160).print(table)


if __name__ == "__main__":
    sys.exit(main())
