"""Every example that a reader can copy is run; commands that pages show exist."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.main import get_command

from ringfx.cli.main import app

ROOT = Path(__file__).parent.parent
PACKAGES = {"ringfx": "ringfx", "passes": "ringfx.passes", "cost_model": "ringfx.cost_model"}
NOT_RUN = "<!-- not run -->"
"""Stands above a block that shows a fragment or needs hardware; the reason follows in prose."""
BLOCK = re.compile(
    rf"(?P<skip>{NOT_RUN}\n+)?(?:<!-- file: (?P<file>\S+) -->\n+)?```python\n(?P<code>.*?)```",
    re.DOTALL,
)
"""The second comment names the file that the reader is told to write."""


def _modules() -> list[str]:
    names = []
    for folder, package in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            inner = path.relative_to(ROOT / folder).with_suffix("").parts
            if ">>> " in path.read_text():
                names.append(".".join((package, *(p for p in inner if p != "__init__"))))
    return names


def _pages() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def _code(page: Path) -> str:
    """The blocks of a page as one program, each at its own line so that errors point at it."""
    text = page.read_text()
    lines = [""] * len(text.splitlines())
    for block in BLOCK.finditer(text):
        if not block["skip"]:
            start = text.count("\n", 0, block.start("code"))
            code = block["code"].splitlines()
            lines[start : start + len(code)] = code
    return "\n".join(lines) if any(lines) else ""


@pytest.mark.parametrize("module", _modules())
def test_doctests(module: str) -> None:
    result = doctest.testmod(importlib.import_module(module), raise_on_error=False)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("page", [p for p in _pages() if _code(p)], ids=_name)
def test_examples_of_a_page_run(page: Path, tmp_path: Path) -> None:
    for block in BLOCK.finditer(page.read_text()):
        if block["file"]:
            (tmp_path / block["file"]).write_text(block["code"])
    program = tmp_path / page.with_suffix(".py").name
    program.write_text(_code(page) + "\n")
    done = subprocess.run(
        [sys.executable, str(program)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/extending.md"])
def test_recipes_are_the_code_of_the_examples(page: str) -> None:
    """Which tests run on two ranks."""
    code = [(ROOT / "examples" / f"own_{name}.py").read_text() for name in ("rule", "strategy")]
    blocks = [block["code"] for block in BLOCK.finditer((ROOT / page).read_text())]
    for example in code:
        assert any(block in example for block in blocks)
    recipes = [b for b in blocks if "ringfx.RULES |" in b or "ringfx.STRATEGIES |" in b]
    assert len(recipes) == len(code)
    assert all(any(block in example for example in code) for block in recipes)


# --- commands -------------------------------------------------------------------------------------

FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
OF_BLOCK = re.compile(r"^ *(?:\$ )?((?:ringfx|make|torchrun|python) .*)", re.MULTILINE)
INDENTED = re.compile(r"^    ((?:ringfx|make|torchrun|python) .*)", re.MULTILINE)
OF_SENTENCE = re.compile(r"`((?:ringfx|make|python -m) [^`]+)`")


def _commands(page: Path) -> Iterator[list[str]]:
    text = page.read_text()
    blocks = "\n".join(FENCED.findall(text))
    prose = FENCED.sub("", text)
    shown = OF_BLOCK.findall(blocks) + INDENTED.findall(prose) + OF_SENTENCE.findall(prose)
    for line in shown:
        yield shlex.split(line.split("   ")[0].replace("...", ""), comments=True)


@pytest.mark.parametrize("page", _pages(), ids=_name)
def test_commands_of_a_page_exist(page: Path) -> None:
    """Each option of ``ringfx``, each target of ``make``, each module of ``python -m``."""
    unknown = [" ".join(words) for words in _commands(page) if not _exists(words)]
    assert not unknown


def _exists(words: list[str]) -> bool:
    if words[0] == "ringfx":
        command = get_command(app).commands.get(words[1])  # type: ignore[attr-defined]
        known = {o for p in command.params for o in (*p.opts, *p.secondary_opts)} if command else ()
        given = {w.strip("[]").split("=")[0] for w in words[2:] if w.strip("[").startswith("--")}
        return command is not None and given <= {*known, "--help"}
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        return words[1] in targets
    if "-m" not in words:
        return True
    name = words[words.index("-m") + 1]
    return name == "pip" or (importlib.util.find_spec(name) is not None)
