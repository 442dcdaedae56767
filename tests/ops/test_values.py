"""Outputs and gradients of every strategy on every rank, against softmax written out in float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.ops.cases import examples
from tests.ops.oracle import Example, assemble, difference, reference, run_all
from tests.ranks import RankPool

TOLERANCE = 1e-12


def assert_equal_to_unsplit(
    cases: Sequence[Example], pool: RankPool | None = None, tolerance: float = TOLERANCE
) -> None:
    """Runs the cases in one call of the pool, or here as one rank, and compares each."""
    by_rank = pool.run(run_all, cases) if pool else [run_all(cases)]
    wrong = []
    for example, results in zip(cases, zip(*by_rank, strict=True), strict=True):
        found = difference(assemble(example, results), reference(example))
        if not max(found.values()) <= tolerance:
            wrong.append(f"{example.label}: {found}")
    assert not wrong, "\n".join(wrong)


def test_every_kind_on_one_rank() -> None:
    assert_equal_to_unsplit(list(examples(1)))


@pytest.mark.ranks
def test_every_kind_on_two_ranks(ranks2: RankPool) -> None:
    assert_equal_to_unsplit(list(examples(2)), ranks2)


@pytest.mark.ranks
def test_every_kind_on_three_ranks(ranks3: RankPool) -> None:
    assert_equal_to_unsplit(list(examples(3)), ranks3)


@pytest.mark.ranks
def test_every_kind_on_four_ranks(ranks4: RankPool) -> None:
    assert_equal_to_unsplit(list(examples(4)), ranks4)
