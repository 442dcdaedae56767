"""A varied part of the corpus on two ranks; ``make corpus`` runs all of it."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

import ringfx
from ringfx.comparison.agreement import Exact, Results, disagreements, excesses, excused
from ringfx.errors import CaptureRefused, VerificationError
from tests.corpus.levers import LEVERS
from tests.corpus.measure import Outcome, Setup, measure
from tests.corpus.report import RESULTS, TABLES, Record
from tests.corpus.row import Variant
from tests.corpus.table import ROWS, VARIANTS
from tests.support.harness import RankPool

pytestmark = pytest.mark.ranks

AUTOCAST = {"gemma3"}
QUICK = {
    v.name: v
    for v in VARIANTS
    if v.attention in v.row.quick and (not v.autocast or v.row.name in AUTOCAST)
}


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


@pytest.mark.parametrize("name", ["deit/eager", "mixtral/sdpa"])
def test_three_steps_with_states_sharded_and_regions_in_chunks(ranks2: RankPool, name: str) -> None:
    """Positions of tokens are parameters in one, experts are of grouped products in the other."""
    exact = "float64" if name == "deit/eager" else None
    setup = Setup(options=LEVERS["all"], compiler="aot_eager", steps=3, dtype=exact)
    record = Record.of(setup.variant(name), {2: ranks2.run(measure, name, True, setup)})
    assert record.verdict == "equal", record.why
    assert record.all_found


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


@pytest.mark.parametrize(("error", "refused"), [(CaptureRefused, True), (VerificationError, False)])
def test_a_defect_that_names_itself_is_no_refusal(
    error: type[ringfx.RingfxError], refused: bool
) -> None:
    with mock.patch("tests.corpus.measure._run", side_effect=error("because")):
        assert measure(VARIANTS[0].name).refused == refused


def test_what_is_committed_names_no_folder_of_a_machine() -> None:
    assert not any("site-packages" in file.read_text() for file in (RESULTS, *TABLES))


def results(**gradients: torch.Tensor | None) -> Results:
    return Results(tensors={f"gradient of {name}": g for name, g in gradients.items()})


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def far(ours: Results, stock: Results, exact: Results) -> set[str]:
    found = disagreements(ours, stock)
    wrong = {name for name, value in found.items() if not value <= 1e-4}
    return wrong - excused(wrong, ours, stock, exact, "float32")


def test_rounding_of_a_gradient_that_is_zero_in_theory_is_no_error() -> None:
    exact = results(weight=tensor(1.0, 2.0), bias=tensor(0.0, 1e-17))
    stock = results(weight=tensor(1.0, 2.0 + 5e-7), bias=tensor(1e-7, 0.0))
    ours = results(weight=tensor(1.0, 2.0), bias=tensor(-5e-7, 1e-7))
    assert not far(ours, stock, exact)
    ours = results(weight=tensor(1.0, 2.0), bias=tensor(-2e-6, 1e-7))
    assert far(ours, stock, exact) == {"gradient of bias"}


def test_a_small_gradient_that_is_off_is_an_error() -> None:
    stock = results(weight=tensor(1.0), bias=tensor(2e-3))
    assert far(results(weight=tensor(1.0), bias=tensor(2.001e-3)), stock, stock)


def test_a_number_is_relied_on_no_further_than_its_type() -> None:
    unit = torch.finfo(torch.float32).eps
    exact = Results(tensors={"loss": tensor(5.0)})
    lucky = Results(tensors={"loss": tensor(5.0)}, units={"loss": unit})
    for off, is_excused in ((1.5, True), (3.0, False)):
        ours = Results(tensors={"loss": tensor(5.0 * (1 + off * unit))})
        assert bool(excused(["loss"], ours, lucky, exact, "float64")) == is_excused


def test_under_autocast_twice_the_unsplit_distance_is_allowed_and_no_more() -> None:
    exact, stock = results(weight=tensor(1.0, 1.0)), results(weight=tensor(1.0, 1.1))
    near, far_off = (results(weight=tensor(1.0, 1.0 + x)) for x in (0.19, 0.21))
    assert excesses(near, stock, exact)["gradient of weight"] <= 1
    assert excesses(far_off, stock, exact)["gradient of weight"] > 1
    nothing = excesses(results(weight=None), stock, exact)
    assert nothing["gradient of weight"] == float("inf")
    nan = excesses(results(weight=tensor(1.0, float("nan"))), stock, exact)
    assert nan["gradient of weight"] == float("inf")


def test_an_unsplit_model_that_is_far_from_exact_excuses_nothing() -> None:
    exact, stock = results(expert=tensor(3.0)), results(expert=tensor(1.0))
    assert far(results(expert=tensor(2.0)), stock, exact) == {"gradient of expert"}


@pytest.mark.parametrize("ours", [tensor(0.0), tensor(float("nan")), tensor(0.0, 0.0)])
def test_zeros_and_nan_agree_with_no_gradient_at_all_never(ours: torch.Tensor) -> None:
    stock = results(used=tensor(1.0), unused=None)
    assert far(results(used=tensor(1.0), unused=ours), stock, stock) == {"gradient of unused"}


def test_the_exact_model_rounds_nothing_to_float32() -> None:
    x = torch.randn(3, 5, dtype=torch.float64)
    with Exact():
        found = (
            x.float(), x.to(torch.float32), x.softmax(-1, dtype=torch.float32),
            torch.zeros(2, dtype=torch.float32),
        )  # fmt: skip
    assert {y.dtype for y in found} == {torch.float64}


def test_the_exact_model_draws_what_the_stock_model_draws() -> None:
    torch.manual_seed(3)
    stock = torch.rand(4)
    torch.manual_seed(3)
    with Exact():
        assert torch.rand(4).tolist() == stock.double().tolist()
