"""Pools of gloo ranks, started when a test first asks for one and shared by the whole session."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.support.other_torch import TORCH, mark_differences
from tests.support.quick import LONG, why_not_quick
from tests.support.ranks import RankPool, avoid_broken_kernels
from tests.support.sampling import take_all

# The same examples everywhere, and no deadline: machines that run tests differ and are shared.
settings.register_profile("ringfx", deadline=None, derandomize=True)
settings.load_profile("ringfx")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick", action="store_true", help="only tests that need neither ranks nor a compiler"
    )
    parser.addoption(
        "--all", action="store_true", help="every case of lists that are sampled otherwise"
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With ``--quick`` the other files are not even imported: transformers alone takes seconds."""
    is_test = collection_path.name.startswith("test_") and collection_path.suffix == ".py"
    left_out = config.getoption("quick") and is_test and why_not_quick(collection_path) is not None
    return True if left_out else None


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("all"):
        take_all()
    avoid_broken_kernels()
    # Threads that wait spinning take the processor from the tests beside them.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # pytest listens to each logger that does not propagate, and torch then writes down every tensor
    # and stack of every compilation for its trace: a tenth of the time.
    logging.getLogger("torch.__trace").propagate = True


POOLS = {"ranks2", "ranks3", "ranks4"}
TESTS = Path(__file__).parent
LONGEST = ("test_examples.py", "integrations", "end_to_end")
"""Files that run first, so that no worker is left alone with one of them at the end."""


@pytest.hookimpl(tryfirst=True)  # before -m looks at the markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if POOLS & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.ranks)
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
    mark_differences(items, TORCH)
    items.sort(key=lambda item: not str(item.path.relative_to(TESTS)).startswith(LONGEST))
    if config.getoption("quick"):
        left_out = [x for x in items if any(x.get_closest_marker(name) for name in LONG)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


def _pool(world_size: int) -> Iterator[RankPool]:
    pool = RankPool(world_size)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def ranks2() -> Iterator[RankPool]:
    yield from _pool(2)


@pytest.fixture(scope="session")
def ranks3() -> Iterator[RankPool]:
    yield from _pool(3)


@pytest.fixture(scope="session")
def ranks4() -> Iterator[RankPool]:
    yield from _pool(4)
