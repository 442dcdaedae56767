"""``python -m tests.corpus``: every architecture at one rank and split, and the tables in docs."""

from __future__ import annotations

import argparse
import fnmatch
import sys
import time
from collections.abc import Sequence

from tests.corpus.forked import outcomes, warm_up
from tests.corpus.report import Record, load, source, update, write_tables
from tests.corpus.row import Variant
from tests.corpus.table import VARIANTS


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    chosen = [v for v in VARIANTS if _wanted(v, options.only)]
    if options.failing:
        before = load()
        chosen = [v for v in chosen if v.name not in before or before[v.name].verdict != "equal"]
    if options.missing:
        chosen = [v for v in chosen if v.name not in load()]
    commit = source()
    part, parts = options.part
    chosen = chosen[part - 1 :: parts]
    if options.stale:
        before = load()
        fresh = (commit, *options.fresh)
        chosen = [v for v in chosen if not _fresh(before.get(v.name), fresh, options.ranks)]
    warm_up()
    started = time.monotonic()
    for number, variant in enumerate(chosen, 1):
        record = examine(variant, options.ranks, commit)
        records = update(record)
        print(f"[{number}/{len(chosen)}] {record.line()}", flush=True)
        if options.limit and time.monotonic() - started > options.limit:
            print(f"stopped after {options.limit} s; {len(chosen) - number} are left")
            break
    records = load()
    write_tables(records)
    bad = [v.name for v in chosen if v.name in records and records[v.name].verdict == "WRONG"]
    print(f"{len(chosen)} variants, {len(bad)} wrong" + "".join(f"\n  {name}" for name in bad))
    return 1 if bad else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.corpus", description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="llama, 't5*/sdpa'")
    parser.add_argument("--failing", action="store_true", help="only what is not equal so far")
    parser.add_argument("--missing", action="store_true", help="only what has no result yet")
    parser.add_argument("--stale", action="store_true", help="only what this commit did not run")
    parser.add_argument("--fresh", nargs="+", default=[], metavar="COMMIT", help="nor these")
    parts = "every Nth variant from the Ith; parts may run at the same time"
    parser.add_argument("--part", type=int, nargs=2, default=(1, 1), metavar=("I", "N"), help=parts)
    parser.add_argument("--limit", type=float, default=0, help="stop after this many seconds")
    return parser.parse_args(arguments)


def _wanted(variant: Variant, names: Sequence[str]) -> bool:
    both = (variant.row.name, variant.name)
    return not names or any(fnmatch.fnmatch(text, name) for name in names for text in both)


def _fresh(record: Record | None, commits: Sequence[str], ranks: Sequence[int]) -> bool:
    """Whether the record holds good results of one of the commits on so many ranks."""
    if (
        record is None
        or record.commit not in commits
        or not {*map(str, ranks)} <= {*record.seconds}
    ):
        return False
    return record.commit == commits[0] or record.verdict == "equal"


def examine(variant: Variant, world_sizes: Sequence[int], commit: str = "") -> Record:
    """The variant on every number of ranks asked for."""
    return Record.of(variant, outcomes(variant.name, world_sizes), commit)


if __name__ == "__main__":
    sys.exit(main())
