"""Pools of gloo ranks, started when a test first asks for one and shared by the whole session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from tests.support.ranks import RankPool, avoid_broken_kernels

# The same examples everywhere, and no deadline: machines that run tests differ and are shared.
settings.register_profile("ringfx", deadline=None, derandomize=True)
settings.load_profile("ringfx")


def pytest_configure() -> None:
    avoid_broken_kernels()


POOLS = {"ranks2", "ranks3", "ranks4"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if POOLS & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.ranks)
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


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
