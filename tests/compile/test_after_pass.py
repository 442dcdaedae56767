"""``RINGFX_DUMP``: a readable file after every pass."""

from __future__ import annotations

from pathlib import Path

import pytest

import ringfx
from ringfx.errors import InvalidArgument
from tests.comparison.models import Decoder, ids


def test_every_pass_leaves_its_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGFX_DUMP", str(tmp_path / "programs"))
    ringfx.plan(Decoder(layers=1), (ids(),), world_size=2)
    files = sorted((tmp_path / "programs").iterdir())
    names = [path.stem.split("-", 2)[2] for path in files]
    assert names == [
        "01-capture", "02-detect-and-masks", "03-axes-and-normalize", "04-place", "05-rewrite",
        "06-chunks",
    ]  # fmt: skip
    captured, _, axes, placed, local, _ = (path.read_text() for path in files)
    assert captured.startswith("# rank 0, program ")
    line = next(x for x in captured.splitlines() if "aten.gelu" in x)
    assert "float32[1, 21, 32]" in line
    assert "# layers.0.mlp.1, " in line
    assert "# layers.0.qkv.weight" in captured
    assert "tokens in dim 1" in next(x for x in axes.splitlines() if "aten.gelu" in x)
    assert " sharded " in next(x for x in placed.splitlines() if "aten.gelu" in x)
    assert "slice_tokens(" in local


def test_a_folder_that_cannot_be_written_is_the_users_to_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("RINGFX_DUMP", str(tmp_path / "file"))
    with pytest.raises(InvalidArgument, match=r"RINGFX_DUMP=.*file: programs cannot be written"):
        ringfx.plan(Decoder(layers=1), (ids(),), world_size=2)


def test_nothing_is_written_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RINGFX_DUMP", raising=False)
    monkeypatch.chdir(tmp_path)
    ringfx.plan(Decoder(layers=1), (ids(),), world_size=2)
    assert not list(tmp_path.iterdir())
