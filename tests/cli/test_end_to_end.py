"""The installed command on real models, with the real planner."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ringfx.ir.plan import Plan

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
        "def no_attention(seq_len):\n"
        "    import torch\n"
        "    return nn.Linear(4, 4), (torch.zeros(1, seq_len, 4),)\n"
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


def test_a_model_without_attention_is_one_line_and_exit_code_2(folder: Path) -> None:
    done = _ringfx(folder, "plain:no_attention", "--seq-len", "64", "--world-size", "2")
    assert done.returncode == 2
    assert done.stderr.startswith("ringfx: ")
    assert "Traceback" not in done.stderr
