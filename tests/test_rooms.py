"""The rooms of the source stand on floors, and imports go down only."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "ringfx"

FLOORS = (
    "errors",
    "units", "torch_compat", "validation", "ir", "watch",                      # values
    "failures", "comm",                                                        # ranks
    "ops.kernels", "ops.tiling", "cost_model.prediction", "strategies", "ops", "nn",  # operators
    "passes.capture", "passes.axes", "passes.tensor_parallel", "passes.exprs",
    "passes.detect", "passes.masks", "passes.token_axes", "passes.normalize",
    "passes.split_modes", "passes.place", "passes.rewrite",
    "passes.verify", "passes.chunks", "passes",
    "cost_model.peak_memory", "cost_model.step_time", "cost_model.choice",
    "cost_model.calibration", "cost_model",
    "split_tensor", "compile", "api", "comparison", "data", "integrations", "report", "cli",
    "__init__", "__main__",
)  # fmt: skip
"""From the ground up. A room's folders below it are part of it, unless they have a row."""

FLAT = {"__init__.py", "__main__.py", "api.py", "errors.py"}
"""The only files beside the rooms."""


def test_only_rooms_lie_under_ringfx() -> None:
    assert {path.name for path in ROOT.glob("*.py")} == FLAT
    rooms = {path.relative_to(ROOT).parts[0] for path in sources()} - FLAT
    assert rooms == {room.split(".")[0] for room in FLOORS} - {Path(name).stem for name in FLAT}


@pytest.mark.parametrize("room", FLOORS)
def test_a_room_imports_from_floors_below_it_only(room: str) -> None:
    """Imports inside functions and for type checkers count as well."""
    upwards = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sources()
        if room_of(module_of(path)) == room
        for line, name in imports(path)
        if FLOORS.index(room_of(name)) > FLOORS.index(room)
    ]
    assert not upwards


def sources() -> list[Path]:
    """Of passes/ and cost_model/ too, to which ringfx/ holds links."""
    folders = os.walk(ROOT, followlinks=True)
    return [
        Path(folder, name)
        for folder, _, names in folders
        for name in sorted(names)
        if name[-3:] == ".py"
    ]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def room_of(module: str) -> str:
    """``passes.axes.rules.views`` is in passes.axes; ``ops.direct`` in ops."""
    parts = module.split(".")
    names = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next(name for name in names if name in FLOORS)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and module of everything that is imported from ringfx, without the ``ringfx.``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, n.name[7:]) for n in node.names if _is_ours(n.name))
        elif isinstance(node, ast.ImportFrom) and node.module == "ringfx":
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom) and _is_ours(node.module or ""):
            yield node.lineno, _submodule((node.module or "")[7:], node.names[0].name)


def _is_ours(name: str) -> bool:
    return name.startswith("ringfx.")


def _submodule(package: str, name: str) -> str:
    """``from ringfx.ops import kernels`` names a room, ``... import shard`` does not."""
    folder = ROOT.joinpath(*package.split("."), name)
    return f"{package}.{name}" if folder.is_dir() or folder.with_suffix(".py").exists() else package
