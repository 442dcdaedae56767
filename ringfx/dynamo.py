"""What is asked of Dynamo wherever it traces for ringfx, and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping

from ringfx.passes.capture.logs import absorb_logs
from ringfx.passes.detect.substitute import for_ringfx, is_for_ringfx, keep_substituting

__all__ = ["NEVER_UNSPLIT", "for_ringfx", "prepare_tracing"]

NEVER_UNSPLIT: Mapping[str, object] = {
    "recompile_limit": 1024,
    "accumulated_recompile_limit": 4096,
    "fail_on_recompile_limit_hit": True,
    "optimize_ddp": False,
}
"""Dynamo gives a function up after 8 recompilations and runs it as it is: with a new length for
each, the model would run unsplit from the ninth on. Here it compiles on, or says why not. Inside
DistributedDataParallel it would cut the graph by parameters: here gradients overlap anyway."""


def prepare_tracing() -> None:
    """Before a program is traced: packages as plain spellings, log lines kept for afterwards."""
    keep_substituting()
    absorb_logs(is_for_ringfx)
