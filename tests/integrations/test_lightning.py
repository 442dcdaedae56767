"""Lightning's Trainer over a split sequence, where Lightning is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning")

import ringfx.integrations
from ringfx.errors import InvalidArgument


def seen(folder: Path, processes: int, shared: int) -> list[Mapping[str, Any]]:
    """What each rank wrote."""
    folder.mkdir()
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    command += ["-m", "tests.integrations.with_lightning", str(folder), str(shared)]
    run = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-6000:]
    return [json.loads((folder / f"rank{i}.json").read_text()) for i in range(processes)]


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("processes", "shared"), [(2, 2), pytest.param(4, 2, marks=pytest.mark.slow)]
)
def test_what_lightning_trains_is_what_one_process_for_each_group_trains(
    processes: int, shared: int, tmp_path: Path
) -> None:
    """Accumulated, clipped, saved, resumed, validated and predicted, on every rank."""
    groups = processes // shared
    expected = seen(tmp_path / "whole", groups, 0)
    for rank, found in enumerate(seen(tmp_path / "split", processes, shared)):
        wanted = expected[rank // shared]
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert found[name] == pytest.approx(value, rel=1e-3, abs=1e-5), (rank, name)
    assert len(set(expected[0]["losses"])) == len(expected[0]["losses"]) >= 3


@pytest.mark.parametrize(
    ("options", "words"),
    [({"mesh": object()}, "pass sequence_ranks=N"), ({"shard_states": True}, "Do: leave it out")],
)
def test_options_that_do_not_go_with_lightning(options: Any, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        ringfx.integrations.lightning.SequenceParallelStrategy(**options)
