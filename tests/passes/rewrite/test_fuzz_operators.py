"""A sample of torch's functions between projection and attention; all of them are slow."""

from __future__ import annotations

import pytest

from tests.models.composed import COMPOSED, DRAWS
from tests.passes.rewrite.fuzz_operators import TOGETHER, Trial, check, trials
from tests.support.sampling import one_in

PARTS = 20
SAMPLED = ("repeat_interleave", "arctan2", "roll", "logsumexp")


def of_composed(names: list[str]) -> list[Trial]:
    return [Trial(space="composed", name=name, way="h", numbers="numbers") for name in names]


def wrong(some: list[Trial], *, ranks: int, after: bool) -> dict[str, str]:
    found = {}
    for start in range(0, len(some), TOGETHER):
        part = some[start : start + TOGETHER]
        for trial, said in zip(part, check(part, ranks=ranks, after=after), strict=True):
            if not said.startswith(("equal", "refused", "not traced")):
                found[str(trial)] = said
    return found


OFTEN = pytest.param(3, True, id="3 ranks")
RARELY = pytest.param(2, False, id="2 ranks", marks=pytest.mark.slow)


@pytest.mark.parametrize(("ranks", "after"), [RARELY, OFTEN])
def test_a_sample_of_functions_is_equal_or_refused(ranks: int, after: bool) -> None:
    some = [t for name in SAMPLED for t in trials(only=name, ways=5) if t.numbers == "numbers"]
    assert wrong(some, ranks=ranks, after=after) == {}


@pytest.mark.parametrize(("ranks", "after"), [RARELY, OFTEN])
def test_singular_values_in_padding_reach_no_weight(ranks: int, after: bool) -> None:
    names = one_in(3, COMPOSED)
    said = list(check(of_composed(names), ranks=ranks, after=after))
    assert dict(zip(names, said, strict=True)) == dict.fromkeys(names, "equal")


def test_draws_into_new_memory_are_those_of_the_unsplit_model() -> None:
    for name in DRAWS:  # each alone: one that draws too often would change the next
        assert list(check(of_composed([name]))) == ["equal"], name


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize(("ranks", "after"), [(2, False), (3, True)])
def test_all_functions_are_equal_or_refused(ranks: int, after: bool, part: int) -> None:
    assert wrong(list(trials())[part::PARTS], ranks=ranks, after=after) == {}
