"""Constants from records: robust least squares with terms that cannot be negative.

Every formula of this package is a sum of non-negative constants times features that grow with the
sizes, so what is fitted is monotone by construction. Residuals are relative, since a millisecond
matters at one millisecond and not at a second; a soft-L1 loss keeps outliers from ruling.

    minimise    sum of rho(((A x - y) / y)^2)        over x >= 0
    censored    y is a lower bound: (A x - y) / y counts where it is negative only
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares, nnls

__all__ = ["Fit", "fit_nonnegative", "leave_one_out"]

Matrix: TypeAlias = NDArray[np.float64]

OUTLIER = 0.1
"""Relative residual beyond which an observation is taken for an outlier."""

RIDGE = 1e-6
"""Weight that keeps terms which no observation tells apart small and the answer unique."""


@dataclass(frozen=True, eq=False)
class Fit:
    """Constants and their relative error on each observation that is not censored."""

    constants: Matrix
    errors: Matrix

    @property
    def median_error(self) -> float:
        return float(np.median(np.abs(self.errors))) if len(self.errors) else 0.0


def fit_nonnegative(features: Matrix, values: Matrix, censored: Matrix | None = None) -> Fit:
    """Constants x >= 0 with features @ x near values, in relative terms.

    Parameters
    ----------
    features
        [observations, terms], none negative.
    values
        [observations], positive.
    censored
        [observations], true where the value is a lower bound; None: nowhere.
    """
    is_censored = np.zeros(len(values), bool) if censored is None else censored.astype(bool)
    relative = features / values[:, None]
    scale = np.maximum(relative.max(axis=0, initial=0.0), np.finfo(float).tiny)
    columns = relative / scale

    def residuals(x: Matrix) -> Matrix:
        misses = columns @ x - 1
        misses[is_censored] = np.minimum(misses[is_censored], 0)
        return np.concatenate([misses, RIDGE * x])

    seen = columns[~is_censored]
    # Of no rows at all scipy's nnls frees memory twice.
    start = nnls(seen, np.ones(len(seen)))[0] if len(seen) else np.zeros(columns.shape[1])
    result = least_squares(
        residuals, start, bounds=(0, np.inf), loss="soft_l1", f_scale=OUTLIER, x_scale=1.0,
        xtol=1e-14, ftol=1e-14, gtol=1e-14,
    )  # fmt: skip
    solution = np.where(result.x < 1e-9 * result.x.max(initial=0.0), 0.0, result.x)
    misses = columns @ solution - 1
    return Fit(solution / scale, misses[~is_censored])


def leave_one_out(features: Matrix, values: Matrix) -> float | None:
    """Median relative error of each observation under a fit to the others; None for too few."""
    num_terms = int((features > 0).any(axis=0).sum())
    if len(values) <= num_terms:
        return None
    misses = []
    for i in range(len(values)):
        others = np.arange(len(values)) != i
        fit = fit_nonnegative(features[others], values[others])
        misses.append(abs(float(features[i] @ fit.constants) / float(values[i]) - 1))
    return statistics.median(misses)
