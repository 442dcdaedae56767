"""What dilated attention costs: ``python -m benchmarks.dilated [--profile FILE]``.

Segments 1024, 2048, 4096 and rates 1, 2, 4, causal, 8 heads of 64, float32, forward and backward,
ranks of one thread. In one run:

- production, dilated beside dense at the same length, in turns;
- memory of a rank, alone and of two;
- time a token at growing lengths, in turns (LongNet's claim: constant);
- with ``--profile``, a calibration of this machine: what each strategy was predicted to take and
  took, at lengths that no calibration holds.

A time is that of the slowest rank from a common start. Memory is what one call allocates at most
beside q, k and v.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.memory import _origin as origin
from benchmarks.seed import HEAD_DIM, HEADS, RATES, SEGMENTS, Case, peak, prepared, timed
from ringfx.comm.local_ranks import LocalRanks
from ringfx.cost_model import load_profile
from ringfx.cost_model.calibration.bench import bench, bench_site
from ringfx.ir.attention_spec import AttentionSpec
from ringfx.ir.values import AttentionSite
from ringfx.ops.dilated import dilated_spec

RESULTS = Path(__file__).parent / "results" / "dilated.json"
LENGTHS = (8_192, 16_384, 32_768, 65_536)
BESIDE_DENSE = 16_384
HELD_OUT = (6_144, 12_288, 20_480)
TRAINING = functools.partial(
    Case, backward=True, causal=True, dtype="float32", device="cpu", rounds=0
)


def in_turns(cases: Sequence[Case], rounds: int) -> list[list[float]]:
    """Seconds of production in each case, one call of each a round; on every rank."""
    calls = [prepared(case, "production") for case in cases]
    for each in calls:
        each()
    seconds: list[list[float]] = [[] for _ in cases]
    for number in range(rounds):
        for i in [*range(number % len(cases), len(cases)), *range(number % len(cases))]:
            seconds[i].append(timed(calls[i], cases[i]))
    return seconds


def peak_of(case: Case) -> int:
    return peak(prepared(case, "production"), case)


def site(length: int) -> AttentionSite:
    """The attention as a plan has it, in contiguous layout."""
    spec = dilated_spec(
        scale=HEAD_DIM**-0.5, length=length, causal=True, segments=SEGMENTS, rates=RATES
    )
    dense = bench_site(tokens=length, heads=HEADS, head_dim=HEAD_DIM)
    return replace(dense, spec=AttentionSpec.from_json(spec), balanced=True)


def main() -> int:
    options = _options()
    console = Console(width=110)
    found: dict[str, Any] = {}
    with LocalRanks(2) as two:
        pair = [TRAINING(length=BESIDE_DENSE, dilated=dilated) for dilated in (True, False)]
        dilated_s, dense_s = two.run(in_turns, pair, options.rounds)[0]
        ratios = [a / b for a, b in zip(dilated_s, dense_s, strict=True)]
        found["beside dense"] = {"tokens": BESIDE_DENSE, "dilated_s": dilated_s, "dense_s": dense_s}
        console.print(
            f"production at {BESIDE_DENSE:,} tokens: dilated {statistics.median(dilated_s):.2f} s, "
            f"dense {statistics.median(dense_s):.2f} s, ratio {_spread(ratios)}"
        )
        growing = [TRAINING(length=length, dilated=True) for length in LENGTHS]
        seconds = two.run(in_turns, growing, options.rounds)[0]
        found["growing"] = [
            {"tokens": case.length, "seconds": s} for case, s in zip(growing, seconds, strict=True)
        ]
        for case, taken in zip(growing, seconds, strict=True):
            per_token = [1e6 * s / case.length for s in taken]
            console.print(f"{case.length:,} tokens: {_spread(per_token)} us a token")
        of_two = max(two.run(peak_of, pair[0]))
    with LocalRanks(1) as one:
        of_one = one.run(peak_of, pair[0])[0]
    found["memory"] = {"tokens": BESIDE_DENSE, "one rank": of_one, "of two ranks": of_two}
    console.print(
        f"memory at {BESIDE_DENSE:,} tokens: {of_one / 2**20:.1f} MiB alone, {of_two / 2**20:.1f} "
        f"on each of two ranks, {of_two / of_one:.2f}"
    )
    if options.profile:
        found["predictions"] = _predictions(options, console)
    options.output.write_text(json.dumps({**found, **origin()}, indent=1) + "\n")
    console.print(f"Written to {options.output}.", highlight=False)
    return 0


def _predictions(options: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    profile = load_profile(options.profile, device="cpu")
    rows = []
    for length in HELD_OUT:
        timings = bench(
            site(length), num_ranks=2, profile=profile, rounds=options.rounds,
            progress=lambda *_: None,
        )  # fmt: skip
        for timing in timings or ():
            rows.append({
                "tokens": length, "strategy": timing.prediction.strategy,
                "predicted_ms": timing.prediction.total_ms, "measured_ms": timing.median_ms,
            })  # fmt: skip
            console.print(
                f"{length:,} tokens, {timing.prediction.strategy}: predicted "
                f"{timing.prediction.total_ms:,.0f} ms, measured {timing.median_ms:,.0f} ms, "
                f"{timing.error:+.0%}"
            )
    return rows


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dilated", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", default=None, help="a calibration of this machine")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
