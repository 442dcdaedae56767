"""Memory of attention over the rows and then the columns of a grid: ``python -m benchmarks.grids``.

A training step of two layers over 512 x 512 tokens, on one rank and on two: peak memory of the
worst rank beyond what was there before the step, each in a fresh process.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import ringfx
from benchmarks.memory import _origin as origin
from examples.peak_memory import extra_bytes
from ringfx.comm.local_ranks import LocalRanks

RESULTS = Path(__file__).parent / "results" / "grids.json"
TARGET = 0.56
"""Of one rank's memory, on two."""
HIDDEN, HEADS, LAYERS = 64, 4, 2


class Axial(nn.Module):
    """x [batch, rows, columns, hidden]: attention along the rows, then along the columns."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(HIDDEN, 3 * HIDDEN) for _ in range(2 * LAYERS))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(HIDDEN, 4 * HIDDEN), nn.GELU(), nn.Linear(4 * HIDDEN, HIDDEN))
            for _ in range(LAYERS)
        )

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.qkv):
            q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(2, 3) for y in layer(x).chunk(3, -1))
            x = x + F.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(3)
            if i % 2:
                x = x + self.mlp[i // 2](x)
            x = x.transpose(1, 2)
        return x


def peak_of(side: int) -> int | None:
    """On each rank: bytes of the third step."""
    torch.manual_seed(0)
    split = ringfx.optimize(Axial())
    given = torch.randn(1, side, side, HIDDEN)

    def step() -> None:
        split(given).square().mean().backward()

    for _ in range(2):
        step()
    return extra_bytes(step)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    peaks = {}
    for number in (1, 2):
        with LocalRanks(number) as ranks:
            peaks[number] = max(ranks.run(peak_of, options.side))
    ratio = peaks[2] / peaks[1]
    Console().print(
        f"{options.side} x {options.side} tokens, {LAYERS} layers: {ratio:.3f} (at most {TARGET})"
    )
    result = {
        "what": f"memory of a step of {LAYERS} layers over rows and columns, on one rank and two",
        "target": TARGET, "side": options.side, "bytes": peaks, "ratio": ratio, **origin(),
    }  # fmt: skip
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    return int(ratio > TARGET)


if __name__ == "__main__":
    raise SystemExit(main())
