"""When two runs of the demo count as the same training."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from examples.runs import Run

__all__ = ["disagreements", "largest_gradient_difference", "loss_difference"]

FIRST_LOSS = 1e-6
GRADIENTS = 1e-4
LATER_LOSS = 1e-3
GRADIENT_FLOOR = 1e-4
"""Gradients that are zero in theory are noise: they count relative to this share of the largest."""


def disagreements(stock: Run, run: Run) -> list[str]:
    """What differs by more than is allowed, in words; empty if nothing does."""
    return [*_wrong_losses(stock, run), *_wrong_gradients(stock, run)]


def loss_difference(stock: Run, run: Run, step: int) -> float:
    """The largest relative difference of any rank's loss from the unsplit run's."""
    expected = stock.losses[0][step]
    return max(_finite(abs(losses[step] - expected) / abs(expected)) for losses in run.losses)


def largest_gradient_difference(stock: Run, run: Run) -> tuple[float, str]:
    """max|g - g*| / max(max|g*|, floor * largest max|g*|), and where it is largest."""
    expected = stock.gradients[0]
    largest = max(float(g.abs().max()) for g in expected.values() if g is not None)
    return max(
        (
            _gradient_difference(gradients.get(name), g, GRADIENT_FLOOR * largest),
            f"{name}, rank {r}",
        )
        for r, gradients in enumerate(run.gradients)
        for name, g in expected.items()
    )


def _wrong_losses(stock: Run, run: Run) -> Iterator[str]:
    for step in range(len(stock.losses[0])):
        allowed = FIRST_LOSS if step == 0 else LATER_LOSS
        difference = loss_difference(stock, run, step)
        if difference > allowed:
            yield f"{run.setting.name}: loss of step {step} by {difference:.1e}, over {allowed:.0e}"


def _wrong_gradients(stock: Run, run: Run) -> Iterator[str]:
    difference, where = largest_gradient_difference(stock, run)
    if difference > GRADIENTS:
        yield f"{run.setting.name}: gradient of {where} by {difference:.1e}, over {GRADIENTS:.0e}"


def _gradient_difference(
    ours: torch.Tensor | None, expected: torch.Tensor | None, floor: float
) -> float:
    if ours is None or expected is None:
        return 0.0 if ours is expected else math.inf
    scale = max(float(expected.abs().max()), floor)
    return _finite(float((ours - expected).abs().max()) / scale)


def _finite(value: float) -> float:
    """NaN compares as False with any bound, so it would pass for agreement."""
    return math.inf if math.isnan(value) else value
