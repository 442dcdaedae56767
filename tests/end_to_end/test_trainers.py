"""The wrappers of accelerate and Trainer train a split model in bfloat16 as a whole one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ranks


@pytest.mark.slow  # tests/integrations train with it too
def test_losses_are_those_of_the_same_recipe_on_one_process(tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    launcher += ["--rdzv-endpoint", "127.0.0.1:0", "-m", "tests.end_to_end.trainers"]
    run = subprocess.run(
        [sys.executable, *launcher, str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    for rank in range(2):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        expected = found.pop("unsplit")
        assert expected[0] - expected[-1] > 0.01, "the model learns, so the losses say something"
        for name, losses in found.items():
            # Losses near 4.8: what one step of bfloat16 weights' rounding moves is below 1e-3.
            assert losses == pytest.approx(expected, abs=1e-3), (rank, name)
