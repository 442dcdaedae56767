"""The commands of ``python -m benchmarks.prediction``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.prediction.measuring import measure_command
from benchmarks.prediction.report import report_command

RESULTS = Path(__file__).parents[1] / "results"
RECORDS = RESULTS / "prediction.jsonl"


def main() -> int:
    """Measures what is missing, or reports; 1 where a limit of the report is not met."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prediction")
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
    reporting.add_argument(
        "--tell-profile",
        action="store_true",
        help="also write the error over loopback into the shipped profile: plans show it",
    )
    options = parser.parse_args()
    if options.command == "report":
        return report_command(options)
    measure_command(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
