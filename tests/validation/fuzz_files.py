"""Reads thousands of damaged files and uses what is accepted: ``python -m
tests.validation.fuzz_files 3000``.

Each must give a RingfxError, or a value with which every view and prediction is finite.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from ringfx.cli.main import app
from ringfx.cost_model import choose, load_profile, predict
from ringfx.cost_model.calibration.from_records import (
    fit_kernels,
    fit_links,
    fit_memory,
    observed_profile,
)
from ringfx.cost_model.calibration.records import AttentionRecord, MessageRecord, read_records
from ringfx.cost_model.prediction.profile import profile_json, read_profile
from ringfx.errors import RingfxError
from ringfx.ir.memory_plan import MemoryPart, MemoryPlan
from ringfx.ir.note import Note
from ringfx.ir.plan import Plan
from ringfx.ir.values import Collective, CommKind, Declined, TokenAxis
from ringfx.strategies import STRATEGIES
from tests.cost_model.sites import causal_site, full_site, shipped
from tests.validation.damage import corrupted

__all__ = ["KINDS", "Verdict", "fuzz"]

Verdict = str
"""``refused``, ``accepted``, or ``WRONG: ...``."""


def fuzz(kind: str, count: int, seed: int = 0) -> Counter[Verdict]:
    """The verdicts on so many corruptions of a kind of file."""
    good, suffix, use = KINDS[kind]
    texts, verdicts = good(), Counter[Verdict]()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "good.json").write_text(_plan().to_json())
        path = Path(folder) / f"damaged{suffix}"
        for number in range(count):
            rng = random.Random(f"{kind} {seed} {number}")
            path.write_bytes(corrupted(rng.choice(texts), rng))
            verdicts[_verdict(use, path, rng, f"{kind} {number}")] += 1
    return verdicts


def _verdict(
    use: Callable[[Path, random.Random], Iterator[float]], path: Path, rng: random.Random, name: str
) -> Verdict:
    try:
        bad = [x for x in use(path, rng) if not 0 <= x < math.inf]
    except RingfxError as error:
        return "refused" if str(error) and "\x1b" not in str(error) else f"WRONG: {name}: {error!r}"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"WRONG: {name}: {error!r:.200} at {where.filename}:{where.lineno}"
    return f"WRONG: {name}: {bad[:3]}" if bad else "accepted"


# --- plans ----------------------------------------------------------------------------------------


def _plan() -> Plan:
    sites = (causal_site(0, 1001), causal_site(1, 1001), full_site(2, 64, heads=8))
    layers = choose(sites, world_size=2, profile=shipped("h100-sxm-published"))
    gather = Collective(
        node="g",
        name="r",
        source="m.py:4",
        kind=CommKind.ALL_GATHER,
        bytes_moved=2**20,
        reason="a sort",
    )
    return Plan(
        world_size=2,
        gpu_memory=80 * 2**30,
        device="cuda",
        profile="h100-sxm-published",
        profile_origin="published figures",
        profile_date="2026-11-23",
        layers=layers,
        declined=(Declined(node="d", name="pool", source="m.py:3", reason="a learned query"),),
        attentions=4,
        axes=(TokenAxis(axis="s0", length=1001, layout="zigzag", local_length=502),),
        collectives=(gather,),
        memory=MemoryPlan(
            parts=(
                MemoryPart(cause="parameters", bytes=2**34, kind="whole"),
                MemoryPart(cause="logits", bytes=2**30, kind="split", detail="split"),
            ),
            by_block=(("model.layers.0", 2**20), ("model.layers.1", 2**20)),
            over_program=(2**20, 2**30, 2**21),
            unknown=("optimizer state",),
        ),
        notes=(Note(text="a note"),),
    )


VIEWS = (
    (), (), ("--json",), ("--what-if", "world-size=8"), ("--what-if", "seq-len=16k,link=1GB/s"),
    ("--sweep", "seq-len=1k..4k"), ("--explain", "*"), ("--html", "{folder}/plan.html"),
    ("--diff", "{folder}/good.json"), ("--gpu-memory", "30GiB", "--max-seq-len"),
    ("--gpu-memory", "20GiB"),
)  # fmt: skip


def _use_plan(path: Path, rng: random.Random) -> Iterator[float]:
    """Through the command line, as a user does."""
    plan = Plan.from_json(path.read_text("utf-8", "surrogateescape"))
    assert Plan.from_json(plan.to_json()) == plan
    plan.digest()
    for view in rng.sample(VIEWS, 2):
        options = [word.format(folder=path.parent) for word in view]
        result = CliRunner().invoke(app, ["plan", str(path), *options])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code in (0, 2), result.exit_code
        yield from _numbers(result.stdout)
    yield from (plan.total_ms, plan.outside_ms, plan.saved_bytes, plan.memory.peak_bytes)


def _numbers(text: str) -> Iterator[float]:
    """Words that are no numbers for a person."""
    for word in re.findall(r"(?<![\w.])(?:nan|inf|NaN|Infinity)(?![\w.])", text):
        yield float(word)


# --- profiles -------------------------------------------------------------------------------------


def _profiles() -> list[str]:
    names = ("cpu-default", "h100-sxm-published", "amd-epyc-2-ranks", "gtx-1080-seed")
    return [profile_json(shipped(name)) for name in names]


def _use_profile(path: Path, rng: random.Random) -> Iterator[float]:
    profile = load_profile(path, device="cpu")
    assert read_profile(profile_json(profile), "again") == profile
    trains = profile.kind != "observed"
    sites = [causal_site(0, 500, trains=trains), full_site(1, 64, dtype="float32", trains=trains)]
    sizes = (1, 3, 16) if trains else (1,)
    refused = None
    for site in sites:
        for name, world_size in ((n, p) for n in STRATEGIES for p in sizes):
            if STRATEGIES[name].admits(site, world_size) is not None:
                continue
            try:
                found = predict(site, STRATEGIES[name], world_size, profile)
            except RingfxError as error:  # no such row: said where it is looked for
                refused = error
                continue
            yield from dataclasses.astuple(found.forward)
            yield from dataclasses.astuple(found.backward)
            yield from (found.saved_bytes, found.workspace_bytes)
    if refused is not None:
        raise refused


# --- records --------------------------------------------------------------------------------------


def _record_lines() -> list[str]:
    folder = resources.files("ringfx.cost_model") / "records"
    seed = (folder / "gtx-1080-seed.jsonl").read_text().splitlines()
    mine = (folder / "amd-epyc-2-ranks.jsonl").read_text().splitlines()
    kernels = [line for line in mine if '"kernel": ""' not in line and '"attention"' in line][:40:4]
    messages = [line for line in mine if '"message"' in line][::4]
    return ["\n".join(rows) + "\n" for rows in (seed, kernels + messages)]


def _as_csv(text: str) -> str:
    rows = [json.loads(line) for line in text.splitlines()]
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = ([json.dumps(str(row.get(n, ""))) for n in names] for row in rows)
    return "\n".join([",".join(names), *map(",".join, cells)]) + "\n"


def _use_records(path: Path, rng: random.Random) -> Iterator[float]:
    records = read_records(path)
    attentions = [r for r in records if isinstance(r, AttentionRecord)]
    messages = [r for r in records if isinstance(r, MessageRecord)]
    if messages:
        links, quality = fit_links(messages, {"loopback": "node"})
        yield from (x for row in links for x in (row.latency_us, row.gbytes_per_s))
        yield quality.median_error
    kernels, quality = fit_kernels(attentions)
    yield from (x for row in kernels for x in (row.call_us, row.gflops, row.ns_per_pair))
    yield quality.median_error
    memory, _ = fit_memory(attentions)
    yield from (x for row in memory for x in (row.base_bytes, row.tensors, row.scores))
    made = observed_profile(attentions, name="mine", device="cpu", origin="records")
    read_profile(profile_json(made), "made")


KINDS: dict[str, tuple[Callable[[], list[str]], str, Any]] = {
    "plan": (lambda: [_plan().to_json()], ".json", _use_plan),
    "profile": (_profiles, ".json", _use_profile),
    "records": (_record_lines, ".jsonl", _use_records),
    "records in CSV": (lambda: [_as_csv(t) for t in _record_lines()], ".csv", _use_records),
}


def main(count: int) -> None:
    for kind in KINDS:
        for verdict, times in sorted(fuzz(kind, count).items()):
            print(f"{kind}: {times} x {verdict}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3000)
