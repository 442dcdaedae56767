"""Which tests need neither ranks nor a compiler: those that `make quick` runs.

A file is read, not run: it and the helpers in tests/ that it imports may use nothing of ``DOORS``.
Of a file that qualifies, the tests that borrow ranks or are marked as long are left out.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

__all__ = ["DOORS", "LONG", "why_not_quick"]

ROOT = Path(__file__).parents[2]

DOORS = (
    "ringfx.optimize", "ringfx.plan", "ringfx.api", "ringfx.compile", "ringfx.passes.capture",
    "ringfx.report.detection_report", "ringfx.cli",                       # they capture a model
    "torch.compile", "torch._dynamo", "torch._inductor", "transformers", "accelerate",
    "subprocess", "multiprocessing", "RankPool()", "LocalRanks()", "webdriver",  # more processes
)  # fmt: skip
"""Names that compile a model or start a process, with all that is below them."""

LONG = ("ranks", "slow", "inductor", "gpu")
"""Markers of tests that are not quick in a file that is."""

STARTS = ("RankPool", "LocalRanks")
"""Starts processes; ranks that a test borrows are seen from its fixtures."""


def why_not_quick(path: Path) -> str | None:
    """The first thing of ``DOORS`` that a test file reaches, and where; None if it is quick."""
    return _reached(path, set())


def _reached(path: Path, seen: set[Path]) -> str | None:
    seen.add(path)
    for name in _names(path):
        if any(name == door or name.startswith(f"{door}.") for door in DOORS):
            return f"{path.name}: {name}"
        helper = _helper(name)
        if helper is not None and helper not in seen:
            further = _reached(helper, seen)
            if further is not None:
                return further
    return None


@functools.cache
def _names(path: Path) -> tuple[str, ...]:
    return tuple(_read_names(ast.parse(path.read_text())))


def _read_names(tree: ast.Module) -> Iterator[str]:
    """What a file imports and which attributes of modules it uses, by their full names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in STARTS:
            yield f"{ast.unparse(node.func)}()"


def _helper(name: str) -> Path | None:
    """The file of tests/ that ``name`` is, or is in."""
    if not name.startswith("tests."):
        return None
    for module in (name, name.rpartition(".")[0]):
        path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
        if path.exists():
            return path
    return None
