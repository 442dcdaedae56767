"""Predicted against measured time of one attention layer, and what the choice costs.

    python -m benchmarks.prediction measure                    over loopback
    python -m benchmarks.prediction measure --link 1gbit       over a shaped link (Linux, root)
    python -m benchmarks.prediction report

``measure`` runs every strategy at every case that has no result yet, at p = 2, one thread a rank,
and appends records (``ringfx.cost_model.records``); it stops in time and goes on where it stopped.
``report`` predicts the same cases with a profile and writes what differs.

The cases are held out: no length, head count and head dim of theirs is one of those that
``ringfx calibrate`` fits (``kernel_cases``), and nothing is fitted to them. Links other than
loopback have their five collectives measured like a calibration's, in the same run; the kernels'
rows are the profile's.

A case during which other processes took more than 6% of the machine's time is not kept.

Each strategy runs once in each round, one after the other. The A/A spread of a figure is by how
much the medians of its odd and its even rounds differ: the same thing measured twice in one run.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from scipy.stats import spearmanr

from benchmarks.memory import _origin as origin
from benchmarks.slow_link import ADDRESSES, PORT, _link
from ringfx.cost_model import Prediction, Profile, load_profile, predict
from ringfx.cost_model.bench import (
    BenchTask,
    Sample,
    Timing,
    admitted,
    bench_site,
    measure,
    regret,
    timing,
)
from ringfx.cost_model.devices import device_name
from ringfx.cost_model.from_records import fit_links
from ringfx.cost_model.measure import Effort, software
from ringfx.cost_model.measure_links import (
    OPERATIONS,
    agreed_count,
    measure_message,
    message_sizes,
)
from ringfx.cost_model.on_ranks import Progress, on_ranks
from ringfx.cost_model.profile import Direction
from ringfx.cost_model.records import AttentionRecord, MessageRecord, Record, read_records
from ringfx.cost_model.records import write_records as write
from ringfx.ops.ranks import Ranks
from ringfx.passes.values import AttentionSite

RESULTS = Path(__file__).parent / "results"
RECORDS = RESULTS / "prediction.jsonl"
NUM_RANKS = 2
LIMITS = {"median": 0.10, "p90": 0.25, "spearman": 0.95, "mean regret": 1.05, "worst regret": 1.25}
MOST_OF_OTHERS = 0.06
"""A case during which others took more of the machine than this is measured again later."""
LINK_EFFORT = Effort(seconds_per_case=0.3, min_repeats=3, max_message_bytes=2**20)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One attention over one link; no two differ in ``train`` alone."""

    link: str
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    mask: str = "causal"
    batch: int = 1
    dtype: str = "float32"
    train: bool = True

    @property
    def site(self) -> AttentionSite:
        _, _, window = self.mask.partition("window ")
        return bench_site(
            tokens=self.tokens,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            batch=self.batch,
            dtype=self.dtype,
            causal=self.mask.startswith("causal"),
            window=int(window) if window else None,
            train=self.train,
        )

    def __str__(self) -> str:
        heads = f"{self.heads}/{self.kv_heads} heads of {self.head_dim}"
        batch = f"{self.batch} x " if self.batch > 1 else ""
        mode = "" if self.train else ", forward"
        return f"{batch}{self.tokens} tokens, {heads}, {self.mask}, {self.dtype}{mode}, {self.link}"


def _cases(link: str, train: bool, mask: str, sizes: str, **more: Any) -> Iterator[Case]:
    """From ``tokens x heads/kv_heads x head_dim`` words."""
    for words in sizes.split():
        tokens, heads, head_dim = words.split("x")
        q_heads, _, kv_heads = heads.partition("/")
        yield Case(
            link=link,
            tokens=int(tokens),
            heads=int(q_heads),
            kv_heads=int(kv_heads or q_heads),
            head_dim=int(head_dim),
            mask=mask,
            train=train,
            **more,
        )


CASES: Sequence[Case] = [
    *_cases("loopback", True, "causal", "700x4x80 1500x6x80 1000x12x48 2200x4/2x96 3000x6/2x80"),
    *_cases("loopback", True, "causal", "3000x6x48 5000x4x40 5000x2x96 7000x2/1x80 6000x3x40"),
    *_cases("loopback", True, "causal", "9000x2x48 400x12x80"),
    *_cases("loopback", True, "full", "700x4x80 1500x6/3x48 1800x6/2x80 2600x4x96 3500x3x48"),
    *_cases("loopback", True, "full", "4500x2x80 2000x10x48"),
    *_cases("loopback", True, "causal, window 300", "3000x6x80 5000x6x48"),
    *_cases("loopback", True, "causal, window 700", "6000x4/2x80 12000x2x48"),
    *_cases("loopback", True, "causal, window 1500", "9000x2x80"),
    *_cases("loopback", False, "causal", "1700x6x80 3200x6x48 5000x4/2x96 9000x4x40 12000x2x80"),
    *_cases("loopback", False, "full", "2700x4x96 4500x4/1x48 6000x3x80"),
    *_cases("loopback", False, "causal, window 600", "9000x4x80"),
    *_cases("loopback", True, "causal", "1500x6x80 3000x4x96 5000x2x48", dtype="bfloat16"),
    *_cases("loopback", True, "full", "1800x4/2x80 2600x3x48", dtype="bfloat16"),
    *_cases("loopback", False, "causal", "5000x4x80", dtype="bfloat16"),
    *_cases("loopback", False, "causal, window 700", "6000x4x48", dtype="bfloat16"),
    *_cases("loopback", True, "causal", "1000x4x80", batch=3),
    *_cases("loopback", True, "causal", "2000x4x48", batch=2),
    *_cases("loopback", True, "full", "900x6/2x80", batch=2),
    *_cases("1gbit", True, "causal", "1000x4x80 2000x6x80 2000x6/1x80 3000x4x48 5000x4/1x80"),
    *_cases("1gbit", True, "causal", "5000x2x80"),
    *_cases("1gbit", True, "full", "1500x4/2x80 2500x4x48"),
    *_cases("1gbit", False, "causal", "3000x6x80 5000x6/1x48"),
    *_cases("1gbit", True, "causal, window 300", "5000x4x48 6000x4/1x80"),
    *_cases("100mbit", True, "causal", "1000x4x80 1500x6/1x80 3000x4/1x80 3000x4x40"),
    *_cases("100mbit", False, "causal", "2000x6/2x80 3000x4x48"),
    *_cases("100mbit", False, "full", "2500x4/1x80"),
    *_cases("100mbit", True, "causal, window 300", "3000x4/1x80"),
]


# --- measuring ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Task:
    cases: tuple[Case, ...]
    rounds: int
    until: float
    """Wall time after which no further case is begun."""
    messages_over: str
    """The link whose messages are to be measured first; empty: none."""
    records: Path


def _measure_all(ranks: Ranks, device: str, progress: Progress, task: _Task) -> int:
    """Appends the records of each case as soon as it is done; how many cases were."""
    if task.messages_over:
        sizes = [size for size in message_sizes(LINK_EFFORT) if size >= 2**14]
        _append(ranks, task.records, (
            measure_message(ranks, operation, size, device, task.messages_over, LINK_EFFORT)
            for operation in OPERATIONS
            for size in sizes
        ))  # fmt: skip
    for done, case in enumerate(task.cases):
        if agreed_count(ranks, int(time.time() > task.until)):
            return done
        progress(str(case), done, len(task.cases))
        names = admitted(case.site, ranks.size)
        bench = BenchTask(site=case.site, strategies=names, rounds=task.rounds)
        watch = _OthersWatch(ranks)
        found = measure(ranks, device, lambda *step: None, bench)
        others = watch.share()
        if others > MOST_OF_OTHERS:
            progress(f"not kept: others took {others:.0%} of the machine", done, len(task.cases))
        else:
            _append(ranks, task.records, _records(case, found))
    return len(task.cases)


class _OthersWatch:
    """What share of the machine's time went to other processes since this was made."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._busy_s, self._own_s, self._start = _busy_seconds(), _own_seconds(), time.time()

    def share(self) -> float:
        """The same on all ranks: rank 0's view, with the time of all ranks."""
        own = torch.tensor([_own_seconds() - self._own_s], dtype=torch.float64)
        dist.all_reduce(own)
        elapsed_s = (time.time() - self._start) * (os.cpu_count() or 1)
        mine = max(0.0, _busy_seconds() - self._busy_s - float(own)) / elapsed_s
        return agreed_count(self._ranks, round(1e4 * mine)) / 1e4


def _busy_seconds() -> float:
    """Of all cores, since the machine started; time that its host stole counts as busy."""
    line = Path("/proc/stat").read_text().splitlines()[0]
    user, nice, system, _idle, _iowait, *rest = (int(x) for x in line.split()[1:9])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system


def _append(ranks: Ranks, path: Path, records: Iterable[Record]) -> None:
    found = tuple(records)
    if ranks.rank == 0:
        before = read_records(path) if path.exists() else ()
        write((*before, *found), path)


def _records(
    case: Case, found: Mapping[str, Mapping[Direction, Sample]]
) -> Iterator[AttentionRecord]:
    for strategy, samples in found.items():
        for direction, sample in samples.items():
            yield AttentionRecord(
                device=device_name("cpu") or "cpu",
                software=software(),
                dtype=case.dtype,
                strategy=strategy,
                kernel="",
                batch=case.batch,
                heads=case.heads,
                kv_heads=case.kv_heads,
                head_dim=case.head_dim,
                v_head_dim=case.head_dim,
                q_len=case.tokens,
                kv_len=case.tokens,
                mask=case.mask,
                density=case.site.density,
                world_size=NUM_RANKS,
                direction=direction,
                link=case.link,
                median_ms=round(sample.median_ms, 4),
                spread=round(sample.spread, 4),
                again=round(sample.again, 4),
            )


def _measure_command(options: argparse.Namespace) -> None:
    done = read_records(options.records) if options.records.exists() else ()
    known = {case_of(r) for r in done if isinstance(r, AttentionRecord)}
    over = {r.link for r in done if isinstance(r, MessageRecord)}
    task = _Task(
        cases=tuple(c for c in CASES if c.link == options.link and c not in known),
        rounds=options.rounds,
        until=time.time() + options.seconds,
        messages_over="" if options.link in ("loopback", *over) else options.link,
        records=options.records,
    )
    if options.link != "loopback" and "RANK" not in os.environ:
        _in_namespaces(options.link)
        return
    torch.set_num_threads(1)
    finished = on_ranks(_measure_all, task, device="cpu", num_ranks=NUM_RANKS, progress=_show)
    if finished is not None:
        print(f"{finished} of {len(task.cases)} missing cases measured over {options.link}")


def _show(what: str, done: int, total: int) -> None:
    print(f"{done}/{total} {what}", file=sys.stderr, flush=True)


def _in_namespaces(link: str) -> None:
    """This command again, once in each of two network namespaces that a slow link joins."""
    with _link(link) as names:
        ranks = []
        for rank, name in enumerate(names):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": str(NUM_RANKS),
                "MASTER_ADDR": ADDRESSES[0],
                "MASTER_PORT": str(PORT),
                "GLOO_SOCKET_IFNAME": f"rfxveth{rank}",
            }
            command = ("ip", "netns", "exec", name, sys.executable, "-W", "ignore")
            words = (*command, "-m", "benchmarks.prediction", *sys.argv[1:])
            ranks.append(subprocess.Popen(words, env=environment))
        failed = [code for process in ranks if (code := process.wait())]
    if failed:
        raise SystemExit(f"a rank ended with {failed}")


# --- reporting ------------------------------------------------------------------------------------


def _key(x: Case | AttentionRecord) -> tuple[object, ...]:
    tokens = x.tokens if isinstance(x, Case) else x.q_len
    return x.link, tokens, x.heads, x.kv_heads, x.head_dim, x.mask, x.batch, x.dtype


BY_KEY: Mapping[tuple[object, ...], Case] = {_key(case): case for case in CASES}
assert len(BY_KEY) == len(CASES), "every case has records of its own"


def case_of(record: AttentionRecord) -> Case:
    """The case that a record belongs to."""
    return BY_KEY[_key(record)]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One case, measured and predicted."""

    case: Case
    timings: tuple[Timing, ...]

    @property
    def chosen(self) -> Timing:
        return min(self.timings, key=lambda t: t.prediction.total_ms)

    @property
    def best(self) -> Timing:
        return min(self.timings, key=lambda t: t.median_ms)


def outcomes(records: Sequence[Record], profile: Profile) -> tuple[Outcome, ...]:
    """Every measured case, with the links that were measured in its own run."""
    by_case: dict[Case, dict[str, dict[Direction, Sample]]] = {}
    for record in records:
        if isinstance(record, AttentionRecord):
            samples = by_case.setdefault(case_of(record), {}).setdefault(record.strategy, {})
            samples[record.direction] = _sample(record)
    profiles = {link: _over(link, records, profile) for link in {case.link for case in by_case}}
    return tuple(
        Outcome(
            case=case,
            timings=tuple(
                timing(predict(case.site, name, NUM_RANKS, profiles[case.link]), found)
                for name, found in by_strategy.items()
            ),
        )
        for case, by_strategy in by_case.items()
    )


def _sample(record: AttentionRecord) -> Sample:
    assert record.median_ms is not None, record
    return Sample(
        median_ms=record.median_ms, spread=record.spread or 0.0, again=record.again or 0.0
    )


def _over(link: str, records: Sequence[Record], profile: Profile) -> Profile:
    """The profile with that link's rows; loopback's are its own."""
    messages = [r for r in records if isinstance(r, MessageRecord) and r.link == link]
    if not messages:
        return profile
    rows, quality = fit_links(messages, {link: "node"})
    return dataclasses.replace(profile, links=rows, quality=quality.words())


def _errors(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Of predicted over measured, less one."""
    errors = sorted(abs(predicted / measured - 1) for predicted, measured in pairs)
    signed = statistics.median(predicted / measured - 1 for predicted, measured in pairs)
    rank = spearmanr([p for p, _ in pairs], [m for _, m in pairs]).statistic
    return {
        "figures": len(pairs),
        "median": round(statistics.median(errors), 4),
        "p90": round(errors[min(len(errors) - 1, round(0.9 * len(errors)))], 4),
        "worst": round(errors[-1], 4),
        "bias": round(signed, 4),
        "spearman": round(float(rank), 4),
    }


def _pairs(timings: Iterable[Timing], part: str) -> list[tuple[float, float]]:
    if part == "forward":
        return [(t.prediction.forward_ms, t.forward.median_ms) for t in timings]
    if part == "backward":
        return [
            (t.prediction.backward_ms, t.backward.median_ms)
            for t in timings
            if t.backward is not None
        ]
    return [(t.prediction.total_ms, t.median_ms) for t in timings]


def _error_table(found: Sequence[Outcome]) -> dict[str, Any]:
    """Errors of all figures, and of each strategy, direction, link and dtype by itself."""
    everything = [(o.case, t) for o in found for t in o.timings]

    def where(keep: Callable[[Case, Timing], bool]) -> list[Timing]:
        return [t for case, t in everything if keep(case, t)]

    strategies = sorted({t.prediction.strategy for _, t in everything})
    links = sorted({case.link for case, _ in everything})
    table = {"all": _errors(_pairs(where(lambda c, t: True), "total"))}
    table |= {
        part: _errors(_pairs(where(lambda c, t: True), part)) for part in ("forward", "backward")
    }
    table |= {
        name: _errors(_pairs(where(lambda c, t, n=name: t.prediction.strategy == n), "total"))
        for name in strategies
    }
    table |= {
        link: _errors(_pairs(where(lambda c, t, n=link: c.link == n), "total")) for link in links
    }
    table |= {
        dtype: _errors(_pairs(where(lambda c, t, n=dtype: c.dtype == n), "total"))
        for dtype in sorted({case.dtype for case, _ in everything})
    }
    return table


# --- what the choice costs --------------------------------------------------------------------


def _regrets(found: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Each case without a budget, and with each budget that forbids some strategy.

    A budget is what the strategies are predicted to hold while the layer runs; it lies between two
    of them, so that the fastest may be forbidden.
    """
    rows = []
    for outcome in found:
        held = sorted({_held(t.prediction) for t in outcome.timings})
        budgets = [None, *((low + high) // 2 for low, high in itertools.pairwise(held))]
        for budget in budgets:
            fitting = [
                t for t in outcome.timings if budget is None or _held(t.prediction) <= budget
            ]
            rows.append(_regret_row(outcome.case, budget, fitting))
    return rows


def _held(prediction: Prediction) -> int:
    return prediction.saved_bytes + prediction.workspace_bytes


def _regret_row(case: Case, budget: int | None, timings: Sequence[Timing]) -> dict[str, Any]:
    chosen = min(timings, key=lambda t: t.prediction.total_ms)
    best = min(timings, key=lambda t: t.median_ms)
    return {
        "case": str(case),
        "budget_bytes": budget,
        "chosen": chosen.prediction.strategy,
        "best": best.prediction.strategy,
        "ratio": round(chosen.median_ms / best.median_ms, 4),
        "regret": round(regret(timings), 4),
        "noise": round(chosen.noise + best.noise, 4),
    }


def _report_command(options: argparse.Namespace) -> int:
    records = read_records(options.records)
    profile = load_profile(options.profile, device="cpu")
    found = outcomes(records, profile)
    errors, regrets = _error_table(found), _regrets(found)
    unlimited = [row for row in regrets if row["budget_bytes"] is None]
    again = sorted(t.noise for o in found for t in o.timings)
    summary = {
        "errors": errors,
        "a_a": {
            "median": round(statistics.median(again), 4),
            "p90": round(again[round(0.9 * (len(again) - 1))], 4),
        },
        "regret": {
            "cases": len(regrets),
            "measured cases": len(unlimited),
            "mean": round(statistics.mean(row["regret"] for row in regrets), 4),
            "worst": round(max(row["regret"] for row in regrets), 4),
            "mean, ties not forgiven": round(statistics.mean(r["ratio"] for r in regrets), 4),
            "worst, ties not forgiven": round(max(row["ratio"] for row in regrets), 4),
            "best strategies": _counts(row["best"] for row in unlimited),
            "chosen strategies": _counts(row["chosen"] for row in unlimited),
        },
        "flips": _flips(found, profile),
        "limits": LIMITS,
    }
    rows = [_figure(o, t) for o in found for t in o.timings]
    text = {
        "what": "predicted and measured time of one attention layer, two ranks, held-out sizes",
        "profile": f"{profile.name}: {profile.origin}",
        **origin(),
        **summary,
        "regrets": regrets,
        "figures": rows,
    }
    options.output.write_text(json.dumps(text, indent=1) + "\n")
    _print(summary)
    return 0 if _within(summary) else 1


def _flips(found: Sequence[Outcome], profile: Profile) -> list[dict[str, Any]]:
    """Over a slow link: what would be chosen if it were as fast as loopback, and what is."""
    rows = []
    for outcome in found:
        if outcome.case.link == "loopback":
            continue
        fast = min(
            outcome.timings,
            key=lambda t: (
                predict(outcome.case.site, t.prediction.strategy, NUM_RANKS, profile).total_ms
            ),
        )
        names = {"on loopback": fast, "chosen": outcome.chosen, "best": outcome.best}
        row: dict[str, Any] = {"case": str(outcome.case)}
        row |= {name: t.prediction.strategy for name, t in names.items()}
        row |= {
            f"{name}, over the best": round(t.median_ms / outcome.best.median_ms, 3)
            for name, t in names.items()
            if name != "best"
        }
        rows.append(row)
    return rows


def _counts(names: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return counts


def _figure(outcome: Outcome, timing: Timing) -> dict[str, Any]:
    prediction = timing.prediction
    row: dict[str, Any] = {
        "case": str(outcome.case),
        "strategy": prediction.strategy,
        "predicted_ms": round(prediction.total_ms, 3),
        "measured_ms": round(timing.median_ms, 3),
        "error": round(timing.error, 4),
        "noise": round(timing.noise, 4),
        "forward_ms": [round(prediction.forward_ms, 3), timing.forward.median_ms],
    }
    if timing.backward is not None:
        row["backward_ms"] = [round(prediction.backward_ms, 3), timing.backward.median_ms]
    return row


def _print(summary: Mapping[str, Any]) -> None:
    for name, row in summary["errors"].items():
        print(
            f"{name:<12} {row['figures']:4} figures: median {row['median']:.1%}, 90% within"
            f" {row['p90']:.1%}, worst {row['worst']:.0%}, bias {row['bias']:+.1%}, Spearman"
            f" {row['spearman']:.3f}"
        )
    print("A/A", summary["a_a"])
    for row in summary["flips"]:
        if row["on loopback"] != row["chosen"] or row["chosen"] != row["best"]:
            print("flip", row)
    print("regret", summary["regret"])


def _within(summary: Mapping[str, Any]) -> bool:
    errors, costs = summary["errors"]["loopback"], summary["regret"]
    return bool(
        errors["median"] <= LIMITS["median"]
        and errors["p90"] <= LIMITS["p90"]
        and errors["spearman"] >= LIMITS["spearman"]
        and costs["mean"] <= LIMITS["mean regret"]
        and costs["worst"] <= LIMITS["worst regret"]
    )


def main() -> int:
    """Measures what is missing, or reports; 1 where a limit of the report is not met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("--link", default="loopback", help="loopback, or a rate of tc: 1gbit")
    measuring.add_argument("--seconds", type=float, default=150)
    measuring.add_argument("--rounds", type=int, default=6)
    measuring.add_argument("--records", type=Path, default=RECORDS)
    reporting = commands.add_parser("report")
    reporting.add_argument("--records", type=Path, default=RECORDS)
    reporting.add_argument("--profile", default="amd-epyc-2-ranks")
    reporting.add_argument("--output", type=Path, default=RESULTS / "prediction.json")
    options = parser.parse_args()
    if options.command == "report":
        return _report_command(options)
    _measure_command(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
