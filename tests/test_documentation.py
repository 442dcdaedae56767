"""Every example that a reader can copy is run: doctests, README.md and docs/*.md."""

from __future__ import annotations

import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"ringfx": "ringfx", "passes": "ringfx.passes", "cost_model": "ringfx.cost_model"}
NOT_RUN = "<!-- not run -->"
"""Stands above a block that shows a fragment or needs hardware; the reason follows in prose."""
BLOCK = re.compile(rf"(?P<skip>{NOT_RUN}\n+)?```python\n(?P<code>.*?)```", re.DOTALL)


def _modules() -> list[str]:
    names = []
    for folder, package in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            inner = path.relative_to(ROOT / folder).with_suffix("").parts
            if ">>> " in path.read_text():
                names.append(".".join((package, *(p for p in inner if p != "__init__"))))
    return names


def _pages() -> list[Path]:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [page for page in pages if page.exists() and _code(page)]


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


@pytest.mark.parametrize("page", _pages(), ids=lambda page: page.name)
def test_examples_of_a_page_run(page: Path, tmp_path: Path) -> None:
    program = tmp_path / page.with_suffix(".py").name
    program.write_text(_code(page) + "\n")
    done = subprocess.run(
        [sys.executable, str(program)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_recipes_are_the_code_of_the_examples(page: str) -> None:
    """Which tests run on two ranks."""
    code = [(ROOT / "examples" / f"own_{name}.py").read_text() for name in ("rule", "strategy")]
    blocks = [block["code"] for block in BLOCK.finditer((ROOT / page).read_text())]
    for example in code:
        assert any(block in example for block in blocks)
    recipes = [b for b in blocks if "ringfx.RULES |" in b or "ringfx.STRATEGIES |" in b]
    assert len(recipes) == len(code)
    assert all(any(block in example for example in code) for block in recipes)
