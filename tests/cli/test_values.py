"""Every option of every command, given a wrong value, ends in one clear message and exit code 2."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from ringfx.cli.main import app

GOOD = {
    "plan": ["mini:make", "--seq-len", "64", "--world-size", "2"],
    "explain": ["mini:make", "--seq-len", "64"],
    "verify": ["mini:make", "--seq-len", "64"],
    "calibrate": ["--quick"],
    "bench": ["--tokens", "64"],
}
HUGE = "9" * 30
WORDS = (
    "",
    "x y z",
    "nan",
    "-1",
    "0",
    "2.5",
    "inf",
    HUGE,
    "9" * 400,
    "9" * 5000,
    "\0",
    "/",
    "a=b=c",
)
NO_FILES = ("", "\0", "/", "9" * 400, "/dev/null/x.json")
CHANGES = tuple(
    f"{name}={value}"
    for name in ("world-size", "seq-len", "link", "latency-us", "gpu-memory")
    for value in ("", "x", "-1", "0", "nan", HUGE, "9" * 5000)
)
FREE: dict[str, tuple[str, ...]] = {
    "plan --html": NO_FILES,
    "plan --optimizer": tuple(w for w in WORDS if w != "0"),
    "plan --what-if": (*WORDS, *CHANGES),
    "plan --sweep": (*WORDS, *CHANGES, "seq-len=8k..4k", f"seq-len=1..{HUGE}"),
    "verify --gpu-memory": tuple(
        w for w in WORDS if w != "2.5"
    ),  # which nothing fits, as ranks say
    "calibrate --out": NO_FILES,
    "calibrate --records": NO_FILES,
    "calibrate --name": ("", "\0", "/", "..", "a/b", "9" * 400),
}
"""Where not every word is wrong."""

MINI = """
import torch
from torch import nn
from torch.nn import functional as F

class Attend(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.qkv = nn.Embedding(16, 32), nn.Linear(32, 96)

    def forward(self, input_ids):
        x = self.qkv(self.embed(input_ids)).chunk(3, -1)
        q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in x)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

def make():
    return Attend()

def of_its_own(seq_len=77):
    return Attend(), (torch.zeros(1, seq_len, dtype=torch.long),)
"""


class Measuring(Exception):
    """The command took its options."""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder: Path = tmp_path_factory.mktemp("values")
    (folder / "mini.py").write_text(MINI)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", [str(folder), *sys.path])
        patch.setenv("RINGFX_PROFILES", str(folder / "profiles"))
        for command in ("cli.bench.bench", "cli.calibrate.calibrate", "comparison.run._copied"):
            patch.setattr(f"ringfx.{command}", _measures)
        yield


def _measures(*args: Any, **kwargs: Any) -> None:
    raise Measuring


def _options() -> Iterator[tuple[str, Any]]:
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        for parameter in command.params:
            if parameter.name != "help" and not getattr(parameter, "is_flag", False):
                yield name, parameter


def _words(command: str, parameter: Any, value: str) -> list[str]:
    if parameter.param_type_name == "argument":
        return [command, value, *GOOD[command][1:]]
    return [command, *GOOD[command], parameter.opts[0], value]


def _wrong(command: str, parameter: Any, value: str) -> str:
    """What is wrong with the answer; empty where nothing is."""
    result = CliRunner().invoke(app, _words(command, parameter, value))
    error = result.exception
    if isinstance(error, Measuring) or result.exit_code == 0:
        return f"{value[:40]!r} was accepted"
    if not isinstance(error, SystemExit):
        return f"{value[:40]!r}: {''.join(traceback.format_exception(error)[-1:])[:200]}"
    said = result.stderr.strip()
    return (
        ""
        if said and result.exit_code == 2 and len(said) < 2500 + len(value)
        else f"{value[:40]!r}: {said}"
    )


@pytest.mark.parametrize(
    ("command", "parameter"), list(_options()), ids=lambda x: x if isinstance(x, str) else x.opts[0]
)
def test_a_wrong_value_ends_in_one_message(here: None, command: str, parameter: Any) -> None:
    values = FREE.get(f"{command} {parameter.opts[0]}", WORDS)
    found = [_wrong(command, parameter, value) for value in values]
    assert not [text for text in found if text]


@pytest.mark.parametrize(
    ("words", "tokens"),
    [
        (["mini:of_its_own"], "77 x 77"),  # the default that the factory has
        (["mini:of_its_own", "--seq-len", "64"], "64 x 64"),
        (["mini:make"], "4,096 x 4,096"),
    ],
)
def test_explain_takes_a_factory_at_its_own_length(
    here: None, words: list[str], tokens: str
) -> None:
    assert f"{tokens} tokens" in CliRunner().invoke(app, ["explain", *words]).output
