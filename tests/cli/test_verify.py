"""``ringfx verify``: what it builds, what it asks for, and how it ends."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from ringfx.cli import verify as command
from ringfx.cli.main import app
from ringfx.comparison.report import FirstDifference, Tensor, Verification, Worst
from ringfx.errors import CommunicationError

FACTORIES = """
import torch
from torch import nn

class Tiny(nn.Module):
    def __init__(self, words=40):
        super().__init__()
        self.embed = nn.Embedding(words, 8)
    def forward(self, input_ids, labels=None):
        return self.embed(input_ids)

def make(): return Tiny()
def large(): return Tiny(words=10**8)
def pair(): return Tiny(), (torch.full((1, 5), 7),)
def usual(seq_len=77): return Tiny(), (torch.full((1, seq_len), 7),)
"""
EQUAL = Verification(
    model="Tiny", world_size=2, dtype="float64", compiler="aot_eager", tolerance=1e-10,
    worst=(Worst(kind="loss", count=1, found=1e-7, name="loss", is_rounding=True),), different=(),
    first=None, narrow=None, reduced=("layers: 32 layers -> 2 (numbers 0, 1)",), notes=(),
    strategies=("simple", "simple"), seconds=3.0,
)  # fmt: skip
DIFFERENT = replace(
    EQUAL,
    different=(Tensor(name="gradient of layers.0.weight", found=0.5, rank=1),),
    first=FirstDifference(
        layer="layers.0", what="the gradient of its weight", direction="backward", rank=1
    ),
)


class Asked:
    """Stands for ``ringfx.verify``."""

    def __init__(self, answer: Verification | Exception) -> None:
        self.answer = answer

    def __call__(self, model: nn.Module, *args: Any, **options: Any) -> Verification:
        self.model, self.args, self.options = model, args, options
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "verified.py"
    path.write_text(FACTORIES)
    return path


def asked(
    monkeypatch: pytest.MonkeyPatch, answer: Verification | Exception, *words: str
) -> tuple[Asked, Any]:
    stands = Asked(answer)
    monkeypatch.setattr(command, "verify", stands)
    return stands, CliRunner().invoke(app, ["verify", *words])


def test_an_equal_model_ends_well(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    words = ("--world-size", "3", "--strategy", "layers.*=simple", "--chunks", "64")
    stands, ended = asked(monkeypatch, EQUAL, f"{file}:make", *words)
    assert ended.exit_code == 0
    assert "Tiny over 2 ranks agrees with the unsplit model" in ended.stdout
    assert "1 loss           1.0e-07  loss (the unsplit model rounds to float32 as much)" in (
        ended.stdout
    )
    assert "reduced: layers: 32 layers -> 2" in ended.stdout
    assert stands.options["world_size"] == 3
    assert stands.options["strategy"] == {"layers.*": "simple"}
    assert stands.options["chunks"] == 64
    assert stands.options["narrow"] is torch.bfloat16
    assert stands.options["kwargs"]["input_ids"].shape == (1, 250)
    assert stands.options["kwargs"]["input_ids"].is_meta, "to be drawn, as zeros hide shifts"


def test_a_different_one_ends_with_1_and_says_where(
    monkeypatch: pytest.MonkeyPatch, file: Path
) -> None:
    _, ended = asked(monkeypatch, DIFFERENT, f"{file}:make")
    assert ended.exit_code == 1
    text = "first difference, in backward: layers.0, the gradient of its weight (rank 1)"
    assert text in ended.stdout
    assert "differs: gradient of layers.0.weight, by 5.0e-01 (rank 1)" in ended.stdout
    assert "Do: not train" in ended.stdout


def test_an_error_of_a_rank_ends_with_2(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    error = CommunicationError("rank 1 of 2: Traceback\nValueError: seventeen")
    _, ended = asked(monkeypatch, error, f"{file}:make")
    assert ended.exit_code == 2
    assert "ValueError: seventeen" in ended.stderr


def test_inputs_of_the_factory_are_used(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    stands, _ = asked(monkeypatch, EQUAL, f"{file}:pair", "--narrow", "none")
    assert torch.equal(stands.args[0], torch.full((1, 5), 7))
    assert stands.options["narrow"] is None


@pytest.mark.parametrize(("words", "tokens"), [((), 77), (("--seq-len", "12"), 12)])
def test_the_length_is_the_factorys_usual_one_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch, file: Path, words: tuple[str, ...], tokens: int
) -> None:
    stands, _ = asked(monkeypatch, EQUAL, f"{file}:usual", *words)
    assert stands.args[0].shape == (1, tokens)


def test_a_large_model_is_reduced_before_it_has_weights(
    monkeypatch: pytest.MonkeyPatch, file: Path
) -> None:
    stands, _ = asked(monkeypatch, EQUAL, f"{file}:large", "--reduce")
    assert all(p.is_meta for p in stands.model.parameters())
