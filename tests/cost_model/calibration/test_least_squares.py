from __future__ import annotations

import numpy as np
import pytest

from ringfx.cost_model.calibration.least_squares import fit_nonnegative, leave_one_out


def _sizes(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.column_stack([np.ones(12), 10 ** rng.uniform(0, 6, 12)])


def test_exact_data_give_the_constants_back() -> None:
    features = _sizes()
    fit = fit_nonnegative(features, features @ np.array([50.0, 0.003]))
    assert fit.constants == pytest.approx([50.0, 0.003], rel=1e-4)
    assert fit.median_error < 1e-5


def test_no_constant_is_negative_even_where_the_data_ask_for_it() -> None:
    features = np.column_stack([np.ones(5), np.arange(1.0, 6)])
    fit = fit_nonnegative(features, 2 * features[:, 1] - 1)
    assert fit.constants[0] == 0
    assert fit.constants[1] > 0


def test_one_wild_observation_does_not_rule() -> None:
    features = _sizes()
    values = features @ np.array([50.0, 0.003])
    values[3] *= 20
    fit = fit_nonnegative(features, values)
    assert fit.constants == pytest.approx([50.0, 0.003], rel=0.05)


def test_a_censored_observation_pulls_up_and_never_down() -> None:
    features = np.array([[1.0, 0.0], [1.0, 1.0], [1.0, 4.0]])
    is_censored = np.array([False, False, True])
    low = fit_nonnegative(features, np.array([10.0, 20.0, 30.0]), is_censored)
    assert features[2] @ low.constants == pytest.approx(50, rel=1e-3)
    high = fit_nonnegative(features, np.array([10.0, 20.0, 80.0]), is_censored)
    assert features[2] @ high.constants > features[2] @ low.constants
    assert len(high.errors) == 2


def test_terms_that_nothing_tells_apart_stay_finite() -> None:
    features = np.array([[1.0, 2.0, 2.0]])
    fit = fit_nonnegative(features, np.array([8.0]))
    assert features[0] @ fit.constants == pytest.approx(8, rel=1e-3)


def test_leaving_out_is_honest_about_what_cannot_be_known() -> None:
    features = _sizes()
    values = features @ np.array([50.0, 0.003])
    assert leave_one_out(features[:2], values[:2]) is None
    noisy = values * np.random.default_rng(1).lognormal(sigma=0.2, size=len(values))
    exact, rough = leave_one_out(features, values), leave_one_out(features, noisy)
    assert exact is not None
    assert rough is not None
    assert exact < 1e-4 < 0.05 < rough
