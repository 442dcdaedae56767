"""The installed command on real models, with the real planner."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from ringfx.cli.main import app
from ringfx.ir.plan import Plan
from ringfx.watch import stages

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 100,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    (folder / "config.json").write_text(json.dumps(LLAMA))
    (folder / "plain.py").write_text(
        "from torch import nn\n"
        "def make(): return nn.Linear(4, 4), ()\n"
        "def no_tokens(seq_len):\n"
        "    import torch\n"
        "    return nn.Linear(4, 4), (torch.zeros(4),)\n"
    )
    return folder


def _ringfx(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    program = "from ringfx.cli.main import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, "plan", *words],
        cwd=folder,
        env={"RINGFX_PROFILES": str(folder / "profiles"), "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def planned(folder: Path) -> str:
    done = _ringfx(folder, *LLAMA_WORDS)
    assert done.returncode == 0, done.stderr
    return done.stdout


LLAMA_WORDS = ("config.json", "--seq-len", "1000", "--world-size", "4", "--json")


def test_a_hugging_face_llama_is_planned_with_names_sources_and_masks(planned: str) -> None:
    plan = Plan.from_json(planned)
    assert [layer.name for layer in plan.layers] == [
        f"model.layers.{i}.self_attn" for i in range(3)
    ]
    for layer in plan.layers:
        path, _, line = layer.source.rpartition(":")
        assert path.endswith(".py")
        assert int(line) > 0
        assert layer.mask == "causal"
        assert layer.site.spec.is_causal
        assert layer.total_ms > 0
    assert plan.axes[0].local_length >= 250
    assert plan.axes[0].layout == "zigzag"


def test_the_same_plan_comes_from_every_run(folder: Path, planned: str) -> None:
    assert _ringfx(folder, *LLAMA_WORDS).stdout == planned


def test_a_model_without_tokens_is_one_line_and_exit_code_2(folder: Path) -> None:
    done = _ringfx(folder, "plain:no_tokens", "--seq-len", "64", "--world-size", "2")
    assert done.returncode == 2
    assert done.stderr.startswith("ringfx: ")
    assert "Traceback" not in done.stderr


def test_what_would_fit_is_said_in_options(folder: Path) -> None:
    target = str(folder / "config.json")
    words = ["plan", target, "--seq-len", "64", "--world-size", "2", "--gpu-memory", "100KB"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert "Do: pass --shard-states on " in result.stderr
    assert "shard_states" not in result.stderr


@pytest.mark.parametrize("is_terminal", [True, False])
def test_stages_with_seconds_are_shown_while_it_works_on_a_terminal(
    folder: Path,
    is_terminal: bool,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = Console(file=io.StringIO(), force_terminal=is_terminal, width=200)
    monkeypatch.setattr(stages, "Console", lambda stderr: shown)
    caplog.set_level(logging.INFO, "ringfx")
    target = str(folder / "config.json")
    result = CliRunner().invoke(app, ["plan", target, "--seq-len", "64", "--world-size", "2"])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("ringfx plan for 2 ranks")
    (line,) = [text for text in caplog.messages if text.startswith(f"planning {target}: ")]
    assert re.findall(r"(\w+) \d+\.\d s", line) == [
        "imported", "built", "traced", "captured", "detected", "placed", "chosen", "rewritten",
        "predicted",
    ]  # fmt: skip
    assert isinstance(shown.file, io.StringIO)
    assert ("captured" in shown.file.getvalue()) == is_terminal
    assert "captured" not in result.output
