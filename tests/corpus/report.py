"""Results of the corpus as a file, and as the tables that people read."""

from __future__ import annotations

import dataclasses
import datetime
import fcntl
import json
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.corpus.measure import Outcome
from tests.corpus.row import Variant
from tests.corpus.table import VARIANTS

__all__ = ["Record", "load", "save", "source", "update", "write_tables"]

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
LOCK = Path(tempfile.gettempdir(), "ringfx-corpus.lock")
TABLES = [
    HERE.parent.parent / "docs" / name
    for name in ("coverage.md", "coverage/found.md", "coverage/split.md")
]


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is known of one variant."""

    name: str
    expected: int
    dtype: str
    verdict: str
    """``equal``, ``refused`` (by ringfx, with a reason) or ``WRONG``."""
    why: str
    """In words, where the verdict is not ``equal``."""
    sites: int
    found_by: str
    masks: str
    declined: tuple[str, ...]
    silent: tuple[str, ...]
    """Reasons that had to be given for declining and were not."""
    errors: Mapping[str, float]
    """Worst relative difference of a gradient, an output or the loss, by number of ranks."""
    gathers: tuple[str, ...]
    narrow_gathers: int
    breaks: tuple[str, ...]
    seconds: Mapping[str, float]
    trace: str = ""
    rounding: int = 0
    """Tensors that agree up to the unsplit model's own rounding only."""
    commit: str = ""
    """The source measured, as ``git describe`` names it; "+" where it had local changes."""
    date: str = ""
    """Day of the measurement, ISO 8601."""

    @property
    def model(self) -> str:
        """The row's name."""
        return self.name.split("/")[0]

    @property
    def all_found(self) -> bool:
        return self.sites == self.expected and not self.silent

    @property
    def fully_split(self) -> bool:
        """No hidden state of a whole sequence on any rank."""
        whole = self.gathers or not self.all_found
        return self.verdict == "equal" and not whole

    @staticmethod
    def of(variant: Variant, outcomes: Mapping[int, Sequence[Outcome]], commit: str = "") -> Record:
        every = [(n, o) for n, ranks in outcomes.items() for o in ranks]
        at_one = outcomes[min(outcomes)][0]
        most = outcomes[max(outcomes)][0]
        verdict, why, trace = _verdict(variant, every)
        return Record(
            name=variant.name,
            expected=variant.sites,
            dtype=variant.precision,
            verdict=verdict,
            why=why,
            sites=len(at_one.found_by),
            found_by=_counted(at_one.found_by),
            masks=_counted(at_one.masks),
            declined=at_one.declined,
            silent=tuple(w for w in variant.row.declined if w not in " ".join(at_one.declined)),
            errors={
                str(n): max(max(o.loss, o.output, o.gradient) for o in ranks)
                for n, ranks in outcomes.items()
                if not any(o.error for o in ranks)
            },
            gathers=most.gathers,
            narrow_gathers=most.narrow_gathers,
            breaks=at_one.breaks,
            seconds={str(n): ranks[0].seconds for n, ranks in outcomes.items()},
            trace=trace,
            rounding=max((len(o.rounding) for _, o in every), default=0),
            commit=commit,
            date=datetime.date.today().isoformat(),
        )

    def line(self) -> str:
        errors = ", ".join(f"p={n} {e:.0e}" for n, e in self.errors.items())
        split = "split" if self.fully_split else f"{len(self.gathers)} gathers"
        took = sum(self.seconds.values())
        return (
            f"{self.name}: {self.verdict}, sites {self.sites}/{self.expected}, {errors}, {split}, "
            f"{took:.0f} s" + (f"\n      {self.why[:400]}" if self.why else "")
        )


def _verdict(variant: Variant, every: Sequence[tuple[int, Outcome]]) -> tuple[str, str, str]:
    for ranks, outcome in every:
        if outcome.error and not outcome.refused:
            return "WRONG", f"p={ranks}: {outcome.error}", outcome.trace
    for ranks, outcome in every:
        if outcome.error:
            return "refused", f"p={ranks}: {outcome.error}", ""
    for ranks, o in every:
        if o.wrong(variant):
            where = (
                f"loss {o.loss:.1e}, output {o.output:.1e} ({o.worst_output}), "
                f"gradient {o.gradient:.1e} ({o.worst_gradient})"
            )
            return "WRONG", f"p={ranks}: {where}", ""
    return "equal", "", ""


def _counted(words: Sequence[str]) -> str:
    return "; ".join(f"{n} x {w}" if n > 1 else w for w, n in Counter(words).items())


def source() -> str:
    """The commit of this tree, with "+" where source files differ from it."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], capture_output=True, text=True, cwd=HERE, check=False
        )
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "/", ":(exclude,top)docs",
                  ":(exclude,top)tests/corpus/results.json")  # fmt: skip
    return git("rev-parse", "--short=9", "HEAD") + ("+" if changed else "")


def load() -> dict[str, Record]:
    if not RESULTS.exists():
        return {}
    found = [Record(**_tuples(fields)) for fields in json.loads(RESULTS.read_text())]
    return {record.name: record for record in found}


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}


def update(record: Record) -> dict[str, Record]:
    """Put one record into the file, which other processes may be writing to; all of them."""
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        records = {**load(), record.name: record}
        save(records)
    return records


def save(records: Mapping[str, Record]) -> None:
    """In the table's order; a row that is gone from the table is dropped."""
    kept = [records[v.name] for v in VARIANTS if v.name in records]
    lines = ",\n".join(json.dumps(dataclasses.asdict(r)) for r in kept)
    RESULTS.write_text(f"[\n{lines}\n]\n")


def write_tables(records: Mapping[str, Record]) -> None:
    """``docs/coverage.md`` and the two tables beside it, from the records."""
    kept = [records[v.name] for v in VARIANTS if v.name in records]
    found = [_found_row(r) for r in kept]
    split = [_split_row(r) for r in kept]
    whole = [_whole_row(r) for r in kept if not r.fully_split and r.dtype != "autocast"]
    texts = (
        SUMMARY.format(summary=summary(kept), whole="\n".join(whole)),
        FOUND.format(found="\n".join(found)),
        SPLIT.format(split="\n".join(split)),
    )
    for page, text in zip(TABLES, texts, strict=True):
        page.write_text(text)


SUMMARY = """\
# Coverage: Hugging Face architectures

Generated by `make corpus` (`python -m tests.corpus`) with transformers 5.23.0 and torch 2.13.0 on
CPU: do not edit. Each model is a tiny random one, a row of the tables in
[tests/corpus](../tests/corpus/table.py), which name its sizes, padding, packing and lengths.
The same figures are in [results.json](../tests/corpus/results.json).

{summary}

[Attention found](coverage/found.md) lists every variant's attentions and masks,
[split over ranks](coverage/split.md) its errors, gathers and graph breaks.

## Not fully split

| model | verdict | gathered, declined or refused |
|---|---|---|
{whole}
"""

FOUND = """\
# Attention found

Of every variant of [the corpus](../coverage.md). Generated by `make corpus`: do not edit.

| model | sites | found by | masks | declined, and why |
|---|---|---|---|---|
{found}
"""

SPLIT = """\
# Split over ranks

Every variant of [the corpus](../coverage.md). Generated by `make corpus`: do not edit.

*Error*: the worst relative difference of the loss, any output and any gradient, on any rank, from
the unsplit model in eager mode; *rounding*: tensors left out of it because they are as close to the
exact result as the unsplit model's are.
[agreement.py](../../ringfx/comparison/agreement.py) says both in formulas.
Under *autocast* (bfloat16) it is the distance from float64 over what is allowed, which is twice the
unsplit model's own. *Fully split*: no hidden state of a whole sequence on any rank.

| model | dtype | error, 2 ranks | 3 ranks | rounding | split | gathered, or refused | commit |
|---|---|---|---|---|---|---|---|
{split}
"""


def summary(records: Sequence[Record]) -> str:
    """The counts, in a sentence each."""
    verdicts = Counter(r.verdict for r in records)
    sites = sum(min(r.sites, r.expected) for r in records)
    models = {r.model for r in records}
    best = [m for m in models if any(r.fully_split for r in records if r.model == m)]
    lines = [
        f"{len(records)} variants of {len(models)} rows: {verdicts['equal']} equal, "
        f"{verdicts['refused']} refused, {verdicts['WRONG']} wrong.",
        f"{sites} of {sum(r.expected for r in records)} attentions found.",
        f"{sum(r.fully_split for r in records)} variants fully split; "
        f"{len(best)} of {len(models)} rows in at least one implementation.",
        _measured(records),
    ]
    return "\n".join(f"- {line}" for line in lines)


def _measured(records: Sequence[Record]) -> str:
    """From which sources, on how many ranks."""
    commits = Counter(r.commit or "an unknown source" for r in records)
    ranks = Counter(tuple(sorted(r.seconds)) for r in records)
    on = "; ".join(f"{n} at p = {', '.join(p)}" for p, n in ranks.most_common())
    of = "; ".join(f"{n} of {commit}" for commit, n in commits.most_common())
    note = "one commit" if len(commits) == 1 else f"{len(commits)} commits, in the last column"
    return f"Measured: {on}. Sources: {note}: {of}."


def _found_row(r: Record) -> str:
    declined = "; ".join(dict.fromkeys(_short(d) for d in r.declined))
    return _cells(r.name, f"{r.sites} / {r.expected}", r.found_by, r.masks, declined)


def _split_row(r: Record) -> str:
    errors = (f"{r.errors[n]:.0e}" if n in r.errors else "" for n in ("2", "3"))
    rest = _short(r.why) if r.why else "; ".join(dict.fromkeys((*r.gathers, *r.breaks)))
    rounding = str(r.rounding or "")
    return _cells(
        r.name, r.dtype, *errors, rounding, "yes" if r.fully_split else "no", rest, r.commit
    )


def _whole_row(r: Record) -> str:
    missed = (
        f"{r.expected - r.sites} of {r.expected} attentions not found" if not r.all_found else ""
    )
    reasons = _short(r.why) if r.why else "; ".join(dict.fromkeys((*r.gathers, *r.declined)))
    return _cells(r.name, r.verdict, "; ".join(x for x in (missed, _short(reasons)) if x))


def _cells(*texts: str) -> str:
    return "| " + " | ".join(t.replace("|", "\\|").replace("\n", " ") for t in texts) + " |"


def _short(text: str, width: int = 300) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."
