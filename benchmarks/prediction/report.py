"""``report``: how far predictions are from the records, and what the choice costs."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from benchmarks.memory import _origin as origin
from benchmarks.prediction.cases import NUM_RANKS, Case, case_of
from ringfx.cost_model import Prediction, Profile, load_profile, predict
from ringfx.cost_model.calibration.bench import Sample, Timing, regret, timing
from ringfx.cost_model.calibration.from_records import fit_links
from ringfx.cost_model.calibration.records import (
    AttentionRecord,
    MessageRecord,
    Record,
    read_records,
)
from ringfx.cost_model.prediction.profile import profile_json, read_profile
from ringfx.cost_model.prediction.profile_rows import Direction
from ringfx.strategies import STRATEGIES
from ringfx.validation.text_files import read_text, write_text

__all__ = ["report_command"]

PROFILES = Path(__file__).parents[2] / "cost_model" / "profiles"
LIMITS = {"median": 0.10, "p90": 0.25, "spearman": 0.95, "mean regret": 1.05, "worst regret": 1.25}


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
                timing(predict(case.site, STRATEGIES[name], NUM_RANKS, profiles[case.link]), found)
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
    """Errors of all figures, and of each direction, strategy, link and dtype by itself."""
    everything = [(o.case, t) for o in found for t in o.timings]
    timings = [t for _, t in everything]
    parts = {"all": "total", "forward": "forward", "backward": "backward"}
    groups: dict[str, list[Timing]] = {}
    for case, found_there in everything:
        for name in (found_there.prediction.strategy, case.link, case.dtype):
            groups.setdefault(name, []).append(found_there)
    return {name: _errors(_pairs(timings, part)) for name, part in parts.items()} | {
        name: _errors(_pairs(group, "total")) for name, group in sorted(groups.items())
    }


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


def report_command(options: argparse.Namespace) -> int:
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
    if options.tell_profile:
        _tell(PROFILES / f"{options.profile}.json", errors["loopback"])
    return 0 if _within(summary) else 1


def _tell(path: Path, errors: Mapping[str, float]) -> None:
    """The error in words, into the file of a profile."""
    words = (
        f"layer times at held-out sizes: median error {errors['median']:.0%}, 90% within"
        f" {errors['p90']:.0%}, {errors['figures']} figures (benchmarks/results/prediction.json)"
    )
    profile = read_profile(read_text(path), str(path))
    write_text(path, profile_json(dataclasses.replace(profile, held_out=words)))


def _flips(found: Sequence[Outcome], profile: Profile) -> list[dict[str, Any]]:
    """Over a slow link: what would be chosen if it were as fast as loopback, and what is."""
    rows = []
    for outcome in found:
        if outcome.case.link == "loopback":
            continue
        fast = min(
            outcome.timings,
            key=lambda t: (
                predict(
                    outcome.case.site, STRATEGIES[t.prediction.strategy], NUM_RANKS, profile
                ).total_ms
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
