"""A sampled list is whole where all is asked for."""

from __future__ import annotations

import pytest

from tests.support import sampling
from tests.support.sampling import one_in, take_all


def test_one_in_so_many_or_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_all", False)
    assert one_in(3, range(8)) == [0, 3, 6]
    take_all()
    assert one_in(3, range(8)) == [*range(8)]
