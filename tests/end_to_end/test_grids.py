"""Attention along one axis of a grid after the other: one is split, along the other it is local."""

from __future__ import annotations

import functools

import pytest
import torch

import ringfx
from tests.models import grids
from tests.models.grids import GRIDS, Grid
from tests.support.harness import Case, RankPool, compare_all, gradient_differences
from tests.support.sampling import one_in

SIZES = ((6, 4), (4, 9), (5, 7))
SAME = [name for name in GRIDS if name != "dropped"]
"""Those that are the same as without ringfx."""


def weighed(output: torch.Tensor) -> torch.Tensor:
    weights = torch.arange(output.numel(), dtype=output.dtype).view(output.shape).cos()
    return (output * weights).square().sum() + output.mean()


def case(name: str, rows: int, columns: int) -> Case:
    return Case(
        model=functools.partial(Grid, name),
        inputs=functools.partial(grids.inputs, name, rows, columns),
        loss=weighed,
        dtype=torch.float64,
        options={"compiler": "eager"},
        label=f"{name}, {rows} x {columns}",
    )


def trained_with_dropout() -> dict[str, torch.Tensor]:
    """A loss and its gradients."""
    torch._dynamo.reset()
    model = Grid("dropped").double()
    split = ringfx.optimize(model, compiler="eager")
    torch.manual_seed(7)
    (x,) = grids.inputs("dropped", 5, 6)
    loss = weighed(split(x.double()))
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def test_dropout_is_that_of_one_rank(ranks3: RankPool) -> None:
    """A rank has a part of the batch, each entry of which drops what it would drop among all."""
    alone = trained_with_dropout()
    for found in ranks3.run(trained_with_dropout):
        assert max(gradient_differences(found, alone).values()) < 1e-10


@pytest.mark.slow  # on three ranks below
def test_every_grid_is_right_on_two_ranks(ranks2: RankPool) -> None:
    cases = [case(name, *SIZES[i % 3]) for i, name in one_in(4, enumerate(SAME))]
    for found in compare_all(ranks2, cases):
        found.check()


def test_every_grid_is_right_on_three_ranks(ranks3: RankPool) -> None:
    cases = [case(name, *SIZES[i % 3]) for i, name in one_in(4, enumerate(SAME[::-1]))]
    for found in compare_all(ranks3, cases):
        found.check()
