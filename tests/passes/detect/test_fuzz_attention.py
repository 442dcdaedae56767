"""Random spellings of attention, a hundred of them; ``make fuzz`` runs two thousand."""

from __future__ import annotations

import pytest

from tests.end_to_end.mixed import check as check_on_ranks
from tests.passes.detect.fuzz_attention import check, check_types, on_ranks
from tests.passes.detect.fuzz_scores import check_scores
from tests.support.ranks import RankPool
from tests.support.sampling import one_in


@pytest.mark.parametrize("start", one_in(2, range(0, 100, 25)))
def test_random_spellings_are_found_or_left_right(start: int) -> None:
    found = [check(seed) for seed in range(start, start + 25)]
    assert any(found)
    assert not all(found)


def test_random_spellings_in_random_types_under_autocast_are_as_near_as_the_unsplit() -> None:
    found = [check_types(seed) for seed in range(200, 216)]
    assert any(found)
    assert not all(found)


@pytest.mark.parametrize("start", range(0, 16, 4))
def test_random_scores_are_split_and_equal(start: int) -> None:
    for seed in range(start, start + 4):
        check_scores(seed)


@pytest.mark.ranks
def test_random_types_on_two_and_three_ranks(ranks2: RankPool, ranks3: RankPool) -> None:
    check_on_ranks(ranks2, [case for case in map(on_ranks, range(300, 308)) if case is not None])
    check_on_ranks(ranks3, [case for case in map(on_ranks, range(316, 324)) if case is not None])
