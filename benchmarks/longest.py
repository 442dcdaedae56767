"""The longest sequence in a fixed memory, and its time: ``python -m benchmarks.longest PROFILE``.

A training step of the Llama of ``benchmarks.real_sizes`` on two ranks of one thread each. What
others do is run in ringfx's own operators: everything kept; Ulysses; Ulysses with all but attention
computed again; a ring with everything computed again. The longest sequence of each is found by
running it. Ours is what the plan answers for that memory: the longest that fits, which is run, and
the length of each of the others, where the plan chooses the fastest that fits.

The profile is one that ``ringfx calibrate`` wrote on this machine. Memory is the worst rank's:
parameters, gradients, optimizer state, and what torch allocates in a step
(``benchmarks.prediction_memory``). Time is the median of the slowest rank's steps. Each run is in
fresh processes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.budgets import planned, ran
from benchmarks.memory import _origin as origin
from benchmarks.real_sizes import CONFIG
from ringfx.errors import RingfxError

RESULTS = Path(__file__).parent / "results" / "longest.json"
OTHERS: Mapping[str, Mapping[str, Any]] = {
    "everything kept": {"chunks": "none", "recompute": "none"},
    "Ulysses": {"strategy": "ulysses", "chunks": "none", "recompute": "none"},
    "Ulysses, all but attention again": {
        "strategy": "ulysses", "chunks": "none", "recompute": "layers",
    },
    "ring, everything again": {
        "strategy": "production", "chunks": "none", "recompute": "attention",
    },
}  # fmt: skip
TARGETS = {"everything kept": 4, "Ulysses, all but attention again": 2}
"""Our longest over theirs, at least."""
STEP = 128
"""Lengths are multiples."""
FULL = 0.97
"""Of the memory that a longest sequence needs at least, to be called that."""
TRIALS = 6


@dataclass(frozen=True, kw_only=True)
class Run:
    what: str
    tokens: int
    bytes: int
    ms: float
    choice: str

    @property
    def ms_a_token(self) -> float:
        return self.ms / self.tokens


@dataclass(frozen=True, kw_only=True)
class Search:
    """What is run, in which memory."""

    budget: int
    profile: str
    steps: int
    console: Console

    def run(self, what: str, options: Mapping[str, Any], tokens: int) -> Run:
        found = ran(options, tokens, self.profile, self.steps, CONFIG)
        made = Run(
            what=what, tokens=tokens, bytes=found.measured_bytes, ms=found.measured_ms,
            choice=found.choice,
        )  # fmt: skip
        self.console.print(made)
        return made

    def longest_of(self, what: str) -> Run:
        """By runs: on the line through the longest that fits and the shortest that does not."""
        known = {tokens: self.run(what, OTHERS[what], tokens) for tokens in (1024, 2048)}
        for _ in range(TRIALS):
            if (best := self._best(known.values())) and best.bytes > FULL * self.budget:
                return best
            runs = [known[tokens] for tokens in sorted(known)]
            fitting = sum(x.bytes <= self.budget for x in runs)
            after = min(max(fitting, 1), len(runs) - 1)
            near, far = runs[after - 1], runs[after]
            a_token = (far.bytes - near.bytes) / (far.tokens - near.tokens)
            tokens = near.tokens + int((0.99 * self.budget - near.bytes) / a_token)
            tokens = tokens // STEP * STEP
            if tokens in known:
                break
            known[tokens] = self.run(what, OTHERS[what], tokens)
        best = self._best(known.values())
        assert best is not None, "the memory is less than what any length needs"
        return best

    def _best(self, known: Iterable[Run]) -> Run | None:
        fitting = (x for x in known if x.bytes <= self.budget)
        return max(fitting, key=lambda x: x.tokens, default=None)

    def ours(self, tokens: int) -> Run:
        return self.run("ours", {"gpu_memory": self.budget}, tokens)

    def our_longest(self) -> int:
        """By plans."""
        fits, too_long = 0, STEP
        while self._is_planned(too_long):
            fits, too_long = too_long, 2 * too_long
        while too_long - fits > STEP:
            middle = (fits + too_long) // 2 // STEP * STEP
            if self._is_planned(middle):
                fits = middle
            else:
                too_long = middle
        return fits

    def _is_planned(self, tokens: int) -> bool:
        try:
            planned({"gpu_memory": self.budget}, tokens, self.profile, CONFIG)
        except RingfxError:
            return False
        return True

    def all(self) -> Iterator[Run]:
        longest = [self.longest_of(what) for what in OTHERS]
        yield from longest
        for tokens in sorted({x.tokens for x in longest} | {self.our_longest()}):
            yield self.ours(tokens)


def rows_of(runs: list[Run]) -> list[dict[str, Any]]:
    ours = {x.tokens: x for x in runs if x.what == "ours"}
    most = max(ours)
    return [
        {
            "what": x.what, "longest": x.tokens, "ms_a_token": x.ms_a_token,
            "our_longest_of_it": most / x.tokens, "our_time_of_it": ours[x.tokens].ms / x.ms,
            "our_longest_time_a_token_of_it": ours[most].ms_a_token / x.ms_a_token,
        }
        for x in runs if x.what != "ours"
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("profile")
    parser.add_argument("--mib", type=int, default=1250, help="of memory, of each rank")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    console = Console(width=160)
    search = Search(
        budget=options.mib * 2**20, profile=options.profile, steps=options.steps, console=console
    )
    runs = list(search.all())
    rows = rows_of(runs)
    result = {
        "what": "the longest sequence in a fixed memory, two ranks", "budget": search.budget,
        "targets": TARGETS, "rows": rows, "runs": [asdict(x) for x in runs], **origin(),
    }  # fmt: skip
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    table = Table(
        "", "longest", "ms a token", "our longest of it", "our time of it, same length",
        "our time a token of it, our longest",
    )  # fmt: skip
    for x in rows:
        table.add_row(
            x["what"], f"{x['longest']:,}", f"{x['ms_a_token']:.2f}",
            f"{x['our_longest_of_it']:.1f}", f"{x['our_time_of_it']:.2f}",
            f"{x['our_longest_time_a_token_of_it']:.2f}",
        )  # fmt: skip
    console.print(table)
    missed = [w for w, least in TARGETS.items() for x in rows
              if x["what"] == w and x["our_longest_of_it"] < least]  # fmt: skip
    console.print(f"missed: {missed}" if missed else "all targets are met")
    return int(bool(missed))


if __name__ == "__main__":
    raise SystemExit(main())
