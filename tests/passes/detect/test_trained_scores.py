"""Scores with trained numbers: found in every spelling with equal gradients."""

from __future__ import annotations

import pytest
import torch

from tests.passes.detect.spellings_eager import B, E, S
from tests.passes.detect.spellings_trained import TRAINED, TRAINED_DECOYS, Trained
from tests.support.direct import canonical, program_of, results, worst


def made(body: object) -> tuple[Trained, list[torch.Tensor]]:
    torch.manual_seed(0)
    model = Trained(body).double()  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    return model, [torch.randn(B, S, E, generator=generator, dtype=torch.float64)]


@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_number_has_its_gradient(name: str) -> None:
    program, values = program_of(*made(TRAINED[name]))
    before = results(program, values)
    sites = canonical(program)
    assert len(sites.found) == 1, sites.declined
    assert worst(results(program, values), before) < 1e-6


@pytest.mark.parametrize("name", TRAINED_DECOYS)
def test_a_decoy_is_left_alone(name: str) -> None:
    program, values = program_of(*made(TRAINED_DECOYS[name]))
    before = results(program, values)
    assert canonical(program).found == ()
    assert worst(results(program, values), before) == 0.0
