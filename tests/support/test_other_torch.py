"""The table of differences marks the tests that it names, on the releases that it names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.support.other_torch import DIFFERENCES, Difference, mark_differences

ROW = Difference(tests="tests/test_a.py::test_b[c, *", first=(2, 11), last=(2, 12), why="because")


@dataclass
class Item:
    nodeid: str
    markers: list[Any] = field(default_factory=list)

    def add_marker(self, marker: Any) -> None:
        self.markers.append(marker)


@pytest.mark.parametrize(
    ("name", "release", "marked"),
    [
        ("tests/test_a.py::test_b[c, d]", (2, 11), True),
        ("tests/test_a.py::test_b[c, d]", (2, 12), True),
        ("tests/test_a.py::test_b[c, d]", (2, 10), False),
        ("tests/test_a.py::test_b[c, d]", (2, 13), False),
        ("tests/test_a.py::test_bc, d]", (2, 11), False),
    ],
)
def test_a_row_marks_its_tests(name: str, release: tuple[int, int], marked: bool) -> None:
    item = Item(name)
    mark_differences([item], release, [ROW])  # type: ignore[list-item]
    assert bool(item.markers) == marked
    for marker in item.markers:
        assert marker.kwargs == {"reason": "because", "strict": True}


def test_the_pinned_release_has_no_differences() -> None:
    assert not [row for row in DIFFERENCES if row.first <= (2, 13) <= row.last]
