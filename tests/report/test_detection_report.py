"""``ringfx explain``: what it prints, as text and as JSON, and how it fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from ringfx.cli.main import app
from ringfx.ir.attention_spec import AttentionSpec
from ringfx.ir.plan_text import to_text
from ringfx.ir.tiles import CAUSAL
from ringfx.ir.values import Declined
from ringfx.passes.detect import Detected
from ringfx.report.detection_report import DetectionReport
from ringfx.report.detection_report_text import formula, tile_text

MODEL = """
import torch
from torch import nn
from torch.nn import functional as F

class Layer(nn.Module):
    def __init__(self, odd):
        super().__init__()
        self.qkv, self.odd = nn.Linear(16, 48), odd

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        if self.odd:
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
            out = out * lse[..., None]
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + out.transpose(1, 2).flatten(2)

def make(seq_len, batch_size):
    layers = [Layer(odd=False), Layer(odd=False), Layer(odd=True), Layer(odd=False)]
    return nn.Sequential(*layers), (torch.zeros(batch_size, seq_len, 16),)

def none(): return nn.Linear(4, 4), (torch.zeros(1, 4, 4),)
"""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "written.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    return "written.py"


def run(*words: str) -> Result:
    return CliRunner().invoke(app, ["explain", *words])


def test_the_text_names_every_attention_and_every_near_miss(model: str) -> None:
    result = run(f"{model}:make", "--seq-len", "64", "--batch-size", "3")
    assert result.exit_code == 0, result.output
    lines = [line.rstrip() for line in result.stdout.splitlines() if line.strip()]
    assert lines[0] == "attention: 3/4 found, 1 declined"
    assert lines[1].split() == ["attention", "found", "by", "at", "mask"]
    assert lines[3].split() == ["{0,1,3}", "3", "x", "sdpa", "written.py:17", "causal"]
    assert lines[4].strip() == "softmax(0.3536 q k^T) v where k <= q"
    assert lines[5].strip() == "3 x 2 heads x 64 x 64 tokens, head dim 8, float32"
    assert lines[6] == "attention-like regions not parallelized"
    rest = " ".join(line.strip() for line in lines[7:])
    assert rest == (
        "2 (written.py:14): its logsumexp is used, which a split attention does not return"
    )


def test_json_holds_the_same(model: str) -> None:
    result = run(f"{model}:make", "--seq-len", "64", "--json")
    found = json.loads(result.stdout)
    assert [site["mask_words"] for site in found["sites"]] == ["causal"] * 3
    assert found["attentions"] == 4
    assert found["missed"] == []
    assert [near["name"] for near in found["declined"]] == ["2"]


def test_a_model_without_attention_is_no_error(model: str) -> None:
    result = run(f"{model}:none")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == "attention: 0/0 found"


def test_strict_fails_on_what_was_missed_with_its_place(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a detection that sees nothing."""
    monkeypatch.setattr(
        "ringfx.passes.steps.detect", lambda *_: Detected(candidates=(), declined=())
    )
    relaxed = run(f"{model}:make", "--seq-len", "64")
    assert "attention: 0/4 found, 4 MISSED" in relaxed.stdout
    assert "looks like attention, NOT RECOGNISED" in relaxed.stdout
    strict = run(f"{model}:make", "--seq-len", "64", "--strict")
    assert strict.exit_code == 2
    assert "4 of the program's attentions were not recognised" in strict.stderr
    assert "(written.py:14)" in strict.stderr


def test_plan_has_the_count_and_strict_too(model: str) -> None:
    words = ["plan", f"{model}:make", "--seq-len", "64", "--world-size", "2"]
    result = CliRunner().invoke(app, words)
    assert "attention: 3/4 found, 1 declined" in result.stdout
    assert CliRunner().invoke(app, [*words, "--strict"]).exit_code == 0


def test_graph_breaks_are_listed() -> None:
    broken = DetectionReport(sites=(), graph_breaks=("model.py:3, in forward: print",))
    assert to_text(broken).splitlines()[-1].strip() == "model.py:3, in forward: print"


def test_equal_near_misses_are_folded() -> None:
    near = [Declined(node="", name=f"layers.{i}", source="a.py:1", reason="why") for i in range(3)]
    assert "layers.{0..2} (a.py:1): why" in to_text(DetectionReport(sites=(), declined=tuple(near)))


def test_a_formula_says_everything_that_the_operator_does() -> None:
    spec = AttentionSpec(
        scale=1.0, q_len=4, kv_len=4, keep=("and", CAUSAL, ("at", 0, ("b",), ("k",))),
        bias=("mul", ("at", 1, ("h",)), ("sub", ("k",), ("q",))), dropout=0.1, sinks=True,
        fully_masked="mean",
    )  # fmt: skip
    assert formula(spec) == (
        "softmax(q k^T + input1[h] * (k - q), a sink for each head, dropout 0.1) v"
        " where k <= q and input0[b, k]; rows without keys give the mean of v"
    )


@pytest.mark.parametrize(
    ("expr", "text"),
    [
        (("gt", ("k",), ("sub", ("q",), ("const", 4))), "k > q - 4"),
        (("or", ("lt", ("k",), ("const", 5)), ("and", CAUSAL, CAUSAL)),
         "k < 5 or (k <= q and k <= q)"),
        (("not", ("eq", ("k",), ("const", 2))), "not(k == 2)"),
        (("and", ("and", CAUSAL, CAUSAL), CAUSAL), "k <= q and k <= q and k <= q"),
        (("where", CAUSAL, ("const", 0.5), ("const", False)), "where(k <= q, 0.5, false)"),
    ],
)  # fmt: skip
def test_a_tile_function_in_infix(expr: tuple[object, ...], text: str) -> None:
    assert tile_text(expr) == text
