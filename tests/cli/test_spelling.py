"""What texts advise is written for the way in: Python's arguments, or a command's options."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import ringfx
from ringfx.cli.main import app
from ringfx.cli.spelling import options_of
from ringfx.units.argument import NAMED, Argument, Code, spelled

ROOT = Path(__file__).parents[2]
MESH = Code('mesh["cp"]')
BY_GLOB = Code('{"*.0": "simple"}', option='"*.0=simple"')


@pytest.mark.parametrize(
    ("name", "value", "python", "option"),
    [
        ("shard_states", True, "shard_states=True", "--shard-states"),
        ("shard_states", False, "shard_states=False", "no --shard-states"),
        ("shard_states", NAMED, "shard_states", "--shard-states"),
        ("shard_states", 16, "shard_states=16", "--state-ranks 16"),
        ("mp_policy", NAMED, "mp_policy", "--param-dtype"),
        ("train", False, "train=False", "--infer"),
        ("gpu_memory", "80GiB", 'gpu_memory="80GiB"', "--gpu-memory 80GiB"),
        ("chunks", 1024, "chunks=1024", "--chunks 1024"),
        ("chunks", "two words", 'chunks="two words"', "--chunks 'two words'"),
        ("strategy", BY_GLOB, 'strategy={"*.0": "simple"}', '--strategy "*.0=simple"'),
        ("rules", Code("mine"), "rules=mine", "--rules MODULE:NAME"),
        ("mesh", MESH, 'mesh=mesh["cp"]', 'mesh=mesh["cp"]'),
        ("target", NAMED, "target", "target"),
    ],
)
def test_an_argument_in_both_ways_in(name: str, value: object, python: str, option: str) -> None:
    command: Any = get_command(app)
    argument = Argument(name, value)
    assert str(argument) == python
    with spelled(options_of(command.commands["plan"].params)):
        assert str(argument) == option
    assert f"{argument}" == python


def test_texts_hold_arguments_that_commands_have_too_as_values() -> None:
    """Written out they would be Python's in what a command prints; but for calls written out."""
    functions = (ringfx.optimize, ringfx.plan, ringfx.verify)
    ours = {name for f in functions for name in inspect.signature(f).parameters}
    commands: Any = get_command(app)
    names = ours & {p.name for command in commands.commands.values() for p in command.params}
    assert {"shard_states", "gpu_memory", "recompute", "rules"} <= names
    written = re.compile(rf"(?<![\w.])({'|'.join(names)})=")
    sources = [*_sources()]
    early = [
        path
        for path, tree in sources
        for part in tree.body
        if not isinstance(part, ast.FunctionDef | ast.ClassDef)
        and re.search(r"(?<!\.)\bArgument\(", ast.unparse(part))
    ]
    assert not early, "made when a module is imported, it is written as that call would have it"
    found = [
        f"{path}: {text}"
        for path, tree in sources
        for text in _literals(tree)
        if written.search(re.sub(r"[\w.]+\([^()]*\)", "", text))
    ]
    assert not found


def _sources() -> Iterator[tuple[Path, ast.Module]]:
    for folder in ("ringfx", "passes", "cost_model"):
        for path in (ROOT / folder).rglob("*.py"):
            yield path.resolve().relative_to(ROOT), ast.parse(path.read_text())


def _literals(tree: ast.Module) -> Iterator[str]:
    """Texts, docstrings apart."""
    docs = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.value
