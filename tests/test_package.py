"""What lands in a user's site-packages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("ringfx", "passes", "cost_model")
"""The first holds links to the other two."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built without network from a clean copy: a stale build/ would leak into it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in SOURCES:
        shutil.copytree(ROOT / name, source / name, ignore=ignore, symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    _pip("wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source))
    (built,) = folder.glob("*.whl")
    return built


def _pip(*args: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", *args], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def _expected(suffix: str) -> set[str]:
    folders = os.walk(ROOT / "ringfx", followlinks=True)
    return {
        Path(folder, name).relative_to(ROOT).as_posix()
        for folder, _, names in folders
        for name in names
        if name.endswith(suffix)
    }


def test_nothing_but_ringfx_is_installed_at_the_top_level(wheel: Path) -> None:
    top = {name.split("/")[0] for name in _names(wheel)}
    assert {name for name in top if not name.endswith(".dist-info")} == {"ringfx"}


@pytest.mark.parametrize("suffix", [".py", ".json", ".html", ".css", "py.typed"])
def test_every_module_profile_and_marker_of_the_repository_is_in_the_wheel(
    wheel: Path, suffix: str
) -> None:
    expected = _expected(suffix)
    assert expected, f"the repository has no {suffix}"
    assert {name for name in _names(wheel) if name.endswith(suffix)} == expected


def test_the_wheel_has_the_license_the_command_and_the_dynamo_backend(wheel: Path) -> None:
    names = _names(wheel)
    assert any(name.endswith("licenses/LICENSE") for name in names), sorted(names)
    with zipfile.ZipFile(wheel) as archive:
        (entry_points,) = (n for n in names if n.endswith("entry_points.txt"))
        text = archive.read(entry_points).decode()
    assert "[torch_dynamo_backends]\nringfx = ringfx.compile.backend:" in text
    assert "[console_scripts]\nringfx = ringfx.cli.main:" in text


def test_an_installed_wheel_imports_from_where_it_was_installed(
    wheel: Path, tmp_path: Path
) -> None:
    _pip("install", "--no-deps", "--no-index", "--target", str(tmp_path), str(wheel))
    program = "import ringfx, ringfx.ir.values as v, ringfx.cost_model as c; " + (
        "print(ringfx.__file__, v.__file__, c.__file__, sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(line.startswith(str(tmp_path)) for line in done.stdout.split()), done.stdout
