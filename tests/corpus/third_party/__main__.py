"""``python -m tests.corpus.third_party``: models of other packages, split over ranks."""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from tests.corpus.third_party.page import RESULTS, load, save, write_page
from tests.corpus.third_party.processes import outcome_of
from tests.corpus.third_party.row import Row
from tests.corpus.third_party.table import ROWS


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    chosen = [r for r in ROWS if _wanted(r, options.only)]
    if options.failing:
        before = load(options.output)
        chosen = [
            r
            for r in chosen
            if r.label not in before or before[r.label]["verdict"] not in ("split", "rows")
        ]
    missing = {p for p in {r.package for r in chosen} if not _is_installed(p)}
    chosen = [r for r in chosen if r.package not in missing]
    for number, row in enumerate(chosen, 1):
        found = outcome_of(row, options.ranks, options.how)
        save(options.output, row.label, found, options.ranks)
        line = f"{found.verdict} {found.worst:.0e} {found.share:.0%} {found.by} {found.seconds} s"
        print(f"[{number}/{len(chosen)}] {row.label}: {line}", flush=True)
        for text in found.why[:3] if found.verdict != "split" else ():
            print(f"    {text[:300]}", flush=True)
    if options.page:
        write_page(options.output)
    if missing:
        print(f"not installed: {', '.join(sorted(missing))}")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.corpus.third_party", description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="'timm/swin*'")
    parser.add_argument("--failing", action="store_true", help="only what is not split so far")
    parser.add_argument("--how", choices=("threads", "ranks"), default="ranks")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FILE")
    parser.add_argument("--page", action="store_true", help="write docs/coverage/third-party.md")
    return parser.parse_args(arguments)


def _wanted(row: Row, names: Sequence[str]) -> bool:
    return not names or any(fnmatch.fnmatch(row.label, name) for name in names)


def _is_installed(package: str) -> bool:
    """Imported once, for all the processes that follow."""
    try:
        importlib.import_module(package.replace("-", "_"))
    except Exception as error:
        print(f"{package}: {type(error).__name__}: {error}", file=sys.stderr)
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
