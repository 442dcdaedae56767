"""Random spellings of attention, a hundred of them; ``make fuzz`` runs two thousand."""

from __future__ import annotations

import pytest

from tests.passes.fuzz_attention import check


@pytest.mark.parametrize("start", range(0, 100, 25))
def test_random_spellings_are_found_or_left_right(start: int) -> None:
    found = [check(seed) for seed in range(start, start + 25)]
    assert any(found)
    assert not all(found)
