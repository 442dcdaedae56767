"""Memory of maps of whole rows of scores, time of dropout: ``python -m benchmarks.scores``.

- ``memory``: a training step of one layer whose scores go through a map of whole rows (the largest
  few, sparsemax, heads that are mixed), on one rank and on two. Peak memory of the worst rank
  beyond what was there before the step; several fresh processes in turns, medians.
- ``dropout``: a training step of one layer of attention on two ranks with 0.1 of its weights
  dropped, by tiles of scores, beside the same layer without, by the fused kernel. Steps run in
  turns; ratios are those of one turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import ringfx
from benchmarks.memory import _origin as origin
from examples.peak_memory import extra_bytes
from ringfx.comm.local_ranks import LocalRanks

RESULTS = Path(__file__).parent / "results" / "scores.json"
TARGETS = {"memory": 0.55, "dropout": 1.3}
"""Of one rank's memory, on two; of the time without dropout."""
HIDDEN, HEADS = 64, 2


def largest(scores: Tensor, layer: Layer) -> Tensor:
    """Weights of the 32 keys that each query likes most."""
    least = scores.topk(32, -1).values[..., -1:]
    return scores.masked_fill(scores < least, -torch.inf).softmax(-1)


def sparsemax(scores: Tensor, layer: Layer) -> Tensor:
    ordered = scores.sort(-1, descending=True).values
    count = torch.arange(1, scores.shape[-1] + 1, dtype=scores.dtype, device=scores.device)
    sums = ordered.cumsum(-1)
    taken = (1 + count * ordered > sums).sum(-1, keepdim=True)
    threshold = (sums.gather(-1, taken - 1) - 1) / taken
    return (scores - threshold).relu()


def mixed_heads(scores: Tensor, layer: Layer) -> Tensor:
    weights = torch.einsum("bhqk,hg->bgqk", scores, layer.mixed).softmax(-1)
    return torch.einsum("bgqk,gh->bhqk", weights, layer.mixed)


MAPS: Mapping[str, Callable[[Tensor, Layer], Tensor]] = {
    "the largest few": largest, "sparsemax": sparsemax, "mixed heads": mixed_heads
}  # fmt: skip


class Layer(nn.Module):
    """One attention by scores, [1, HEADS, S, S], or by torch's own function."""

    def __init__(self, name: str, dropout: float = 0.0) -> None:
        super().__init__()
        self.name, self.dropout = name, dropout
        width = HIDDEN if name else 512
        self.heads = HEADS if name else 8
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mixed = nn.Parameter(torch.eye(HEADS) + 0.1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1)
        )
        if self.name:
            found = MAPS[self.name](q @ k.mT * q.shape[-1] ** -0.5, self) @ v
        else:
            found = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout)
        return x + self.out(found.transpose(1, 2).flatten(2))


def peak_of(name: str, tokens: int) -> int | None:
    """On each rank: bytes of the third step."""
    torch.manual_seed(0)
    model = Layer(name)
    split = ringfx.optimize(model)
    given = torch.randn(1, tokens, HIDDEN)

    def step() -> None:
        split(given).square().mean().backward()

    for _ in range(2):
        step()
    return extra_bytes(step)


def seconds_of(tokens: int, rounds: int) -> Mapping[str, list[float]]:
    """On each rank: of steps with dropout and without, after a first one of each."""
    models = {}
    for name, dropout in (("with", 0.1), ("without", 0.0)):
        torch.manual_seed(0)
        models[name] = ringfx.optimize(Layer("", dropout), strategy="production")
    given = torch.randn(1, tokens, 512)
    found: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds + 1):
        for name, model in models.items():
            started = time.perf_counter()
            model(given).square().mean().backward()
            if number:
                found[name].append(time.perf_counter() - started)
    return found


def on_ranks(number: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    with LocalRanks(number) as ranks:
        return ranks.run(function, *arguments)


def memory_of(name: str, tokens: int, rounds: int) -> Mapping[str, Any]:
    peaks: dict[int, list[int]] = {1: [], 2: []}
    for _ in range(rounds):
        for number, found in peaks.items():
            found.append(max(on_ranks(number, peak_of, name, tokens)))
    one, two = (statistics.median(peaks[number]) for number in (1, 2))
    return {"map": name, "tokens": tokens, "bytes": peaks, "ratio": two / one}


def dropout_of(tokens: int, rounds: int) -> Mapping[str, Any]:
    """The slowest rank's seconds."""
    by_rank = on_ranks(2, seconds_of, tokens, rounds)
    seconds = {
        name: list(map(max, zip(*(x[name] for x in by_rank), strict=True))) for name in by_rank[0]
    }
    pairs = zip(seconds["with"], seconds["without"], strict=True)
    ratios = sorted(a / b for a, b in pairs)
    return {"tokens": tokens, "seconds": seconds, "ratio": statistics.median(ratios),
            "least": ratios[0], "most": ratios[-1]}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=TARGETS, default=[*TARGETS])
    parser.add_argument("--maps", nargs="+", choices=MAPS, default=[*MAPS])
    parser.add_argument("--tokens", type=int, default=8_192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    console = Console()
    found: dict[str, list[Mapping[str, Any]]] = {part: [] for part in options.parts}
    if "memory" in found:
        for name in options.maps:
            found["memory"].append(memory_of(name, options.tokens, options.rounds))
            _print(console, name, found["memory"][-1], TARGETS["memory"])
    if "dropout" in found:
        found["dropout"].append(dropout_of(options.tokens // 2, options.rounds))
        _print(console, "dropout", found["dropout"][-1], TARGETS["dropout"])
    result = {
        "what": "memory of maps of whole rows of scores, time of dropout of weights",
        "targets": TARGETS,
        **found,
        **origin(),
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    rows: Sequence[tuple[str, Mapping[str, Any]]] = [(k, x) for k, v in found.items() for x in v]
    return int(any(x["ratio"] > TARGETS[part] for part, x in rows))


def _print(console: Console, name: str, found: Mapping[str, Any], target: float) -> None:
    console.print(f"{name}, {found['tokens']:,} tokens: {found['ratio']:.3f} (at most {target})")


if __name__ == "__main__":
    raise SystemExit(main())
