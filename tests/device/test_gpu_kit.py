"""The kit for a GPU, on a CPU: stages are what the table says, and go on after what fails."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import torch

from benchmarks.gpu.__main__ import STAGES, main
from benchmarks.gpu.stage import Report, Setting
from tests.device.walk import backward


def test_every_stage_is_a_function_of_its_module() -> None:
    for stage in STAGES:
        module = import_module(f"benchmarks.gpu.{stage.module}")
        assert callable(getattr(module, stage.function))
        assert stage.limit_s <= 480


def test_a_stage_runs_alone_and_writes_what_it_found(tmp_path: Path) -> None:
    words = ["--device", "cpu", "--small", "--only", "seed", "--output", str(tmp_path)]
    assert main(words) == 0
    found = json.loads((tmp_path / "seed.json").read_text())
    assert found["failures"] == 0
    names = {row["name"] for row in found["rows"]}
    assert names >= {"dense, production, 256 tokens", "dilated, production, 256 tokens"}
    assert torch.__version__.startswith(found["packages"]["torch"])


def test_what_fails_is_a_row_and_the_next_is_tried(tmp_path: Path) -> None:
    report = Report(stage="any", setting=Setting(device="cpu", small=True, folder=tmp_path))
    report.tried("first", lambda: {"value": 1 / 0})
    report.tried("second", lambda: {"value": 2})
    rows = json.loads((tmp_path / "any.json").read_text())["rows"]
    assert [row["ok"] for row in rows] == [False, True]
    assert rows[0]["error"].startswith("ZeroDivisionError")
    assert report.failures == 1


def test_the_walk_without_an_engine_runs_every_node() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    shared = x.exp()
    outputs = [(shared * shared.sin()).sum(), shared[0].square(), x.detach()]
    # exp, sin, mul, sum, select, pow; leaves are where it ends.
    assert backward(outputs) == 6
