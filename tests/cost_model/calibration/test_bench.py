from __future__ import annotations

import pytest
from typer.testing import CliRunner

from ringfx.cli.main import app
from ringfx.cost_model.calibration.bench import Sample, Timing, regret
from ringfx.cost_model.prediction.predict import Phase, Prediction


def _timing(name: str, predicted: float, measured: float, spread: float = 0.0) -> Timing:
    prediction = Prediction(
        strategy=name,
        kernel="cpu_flash",
        forward=Phase(compute_s=predicted / 1e3),
        backward=Phase(),
        saved_bytes=0,
        workspace_bytes=0,
    )
    sample = Sample(median_ms=measured, spread=spread, again=0.0)
    return Timing(prediction=prediction, forward=sample)


def test_a_sample_tells_its_spread_and_how_it_repeats() -> None:
    sample = Sample.of([10.0, 12.0, 10.0, 12.0, 10.0])
    assert (sample.median_ms, sample.again) == (10.0, pytest.approx(0.2))
    assert sample.spread == pytest.approx(0.1)
    assert Sample.of([3.0]).again == 0


def test_regret_is_what_the_choice_costs_over_the_best() -> None:
    assert regret([_timing("a", 1, 10), _timing("b", 2, 20)]) == 1.0
    assert regret([_timing("a", 1, 30), _timing("b", 2, 20)]) == 1.5


def test_differences_inside_the_spread_are_ties() -> None:
    near = [_timing("a", 1, 21, spread=0.03), _timing("b", 2, 20, spread=0.03)]
    assert regret(near) == 1.0
    far = [_timing("a", 1, 22, spread=0.03), _timing("b", 2, 20, spread=0.03)]
    assert regret(far) == pytest.approx(1.1)


def test_error_is_relative_to_the_measurement() -> None:
    assert _timing("a", 12, 10).error == pytest.approx(0.2)


@pytest.mark.ranks
def test_the_command_measures_every_strategy_that_can_run() -> None:
    words = ["--tokens", "256", "--heads", "4", "--head-dim", "16", "--rounds", "2"]
    result = CliRunner().invoke(app, ["bench", *words])
    assert result.exit_code == 0, result.output
    lines = result.stdout.split("\n")
    assert lines[0].startswith("causal, 256 tokens, 2 ranks, profile ")
    assert {line.split()[0] for line in lines[2:6]} == {
        "simple", "collective", "production", "ulysses",
    }  # fmt: skip
    assert lines[6].startswith("chosen ")
    assert "regret" in lines[6]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--heads", "3", "--kv-heads", "2"], "3 query heads for 2 key/value heads. Do: use a"),
        (["--dtype", "int3"], "'int3' is not a floating dtype. Do: give float32,"),
        (
            ["--device", "abacus"],
            "unknown device 'abacus'. Do: give --device cpu or --device cuda.",
        ),
        (["--tokens", "none"], "'none' is not a number of tokens."),
        (["--profile", "absent"], "there is no profile 'absent'."),
    ],
)
def test_what_cannot_be_measured_is_refused_before_ranks_start(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ringfx.cli.bench.bench", lambda *args, **options: pytest.fail("began"))
    result = CliRunner().invoke(app, ["bench", *words])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"ringfx: {message}")
