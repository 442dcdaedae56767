"""A varied part of the corpus on two ranks; ``make corpus`` runs all of it."""

from __future__ import annotations

import pytest

from tests.corpus.measure import Outcome, measure
from tests.corpus.report import Record
from tests.corpus.row import Variant
from tests.corpus.table import ROWS, VARIANTS
from tests.harness import RankPool

pytestmark = pytest.mark.ranks

QUICK = {v.name: v for v in VARIANTS if v.attention in v.row.quick}


@pytest.fixture(scope="module")
def found(ranks2: RankPool) -> list[dict[str, Outcome]]:
    """All in one call of the pool, since a call costs a new process group."""
    return ranks2.run(outcomes, list(QUICK))


def outcomes(names: list[str]) -> dict[str, Outcome]:
    return {name: measure(name) for name in names}


@pytest.mark.parametrize("name", QUICK)
def test_an_architecture_gives_the_unsplit_results_and_gathers_no_hidden_state(
    found: list[dict[str, Outcome]], name: str
) -> None:
    record = Record.of(QUICK[name], {2: [by_rank[name] for by_rank in found]})
    assert record.verdict == "equal", record.why
    assert record.fully_split, record


def test_every_architecture_has_a_name_of_its_own() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert len({row.model for row in ROWS}) >= 45


def test_a_wrong_gradient_is_called_wrong() -> None:
    variant: Variant = VARIANTS[0]
    fine = Outcome(seconds=1.0, found_by=("sdpa",) * 2)
    off = Outcome(seconds=1.0, found_by=("sdpa",) * 2, gradient=2e-4, worst_gradient="q.weight")
    assert Record.of(variant, {2: [fine, fine]}).verdict == "equal"
    record = Record.of(variant, {2: [fine, off]})
    assert record.verdict == "WRONG"
    assert "gradient 2.0e-04 (q.weight)" in record.why


def test_an_internal_error_is_wrong_and_a_refusal_is_not() -> None:
    variant = VARIANTS[0]
    refused = Outcome(seconds=1.0, error="CaptureRefused: because", refused=True)
    raw = Outcome(seconds=1.0, error="KeyError: 3", trace="somewhere")
    assert Record.of(variant, {2: [refused, refused]}).verdict == "refused"
    assert Record.of(variant, {2: [refused, raw]}).verdict == "WRONG"
