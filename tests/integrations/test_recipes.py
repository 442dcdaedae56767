"""Trainer and accelerate over a split sequence do what they do with as many processes as groups."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest

from tests.integrations.recipes import RECIPES

pytestmark = pytest.mark.ranks

FEW = ("plain", "streamed", "streamed_evaluation")
SOME = ("evaluated", "by_device", "streamed_by_each", "resumed_with_sharded_states", "accelerated")
"""Recipes that several groups change."""


@cache
def seen(processes: int, shared: int, names: Sequence[str]) -> list[Mapping[str, Any]]:
    """What each rank wrote."""
    folder = Path(mkdtemp(prefix="ringfx-recipes-"))
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    command += ["-m", "tests.integrations.recipes", str(folder), str(shared), *names]
    run = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-6000:]
    return [json.loads((folder / f"rank{i}.json").read_text()) for i in range(processes)]


@pytest.mark.parametrize(
    ("processes", "shared", "names"),
    [
        (2, 2, tuple(RECIPES)),
        (4, 2, FEW),
        pytest.param(3, 3, ("plain", "accelerated"), marks=pytest.mark.slow),
        pytest.param(4, 2, SOME, marks=pytest.mark.slow),
    ],
)
def test_what_is_trained_is_what_one_process_for_each_group_trains(
    processes: int, shared: int, names: Sequence[str]
) -> None:
    """Losses, norms, metrics, rows, saved and trained parameters, on every rank."""
    whole = tuple(RECIPES) if processes == shared else names
    expected = seen(processes // shared, 0, whole)[0]
    for rank, found in enumerate(seen(processes, shared, names)):
        for name in names:
            assert found[name].keys() == expected[name].keys()
            for what, value in expected[name].items():
                same = found[name][what]
                if isinstance(value, float) or (value and isinstance(value[0], float)):
                    assert same == pytest.approx(value, rel=1e-3, abs=1e-5), (rank, name, what)
                else:
                    assert same == value, (rank, name, what)


def test_the_recipes_learn() -> None:
    """So that equal numbers say something."""
    for name, found in seen(1, 0, tuple(RECIPES))[0].items():
        assert len(set(found["loss"])) == len(found["loss"]) >= 3, name
