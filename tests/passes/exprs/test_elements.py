"""Every row of the element table says what its operator computes, at every index."""

from __future__ import annotations

import functools
import operator

import pytest
import torch

from ringfx.passes.exprs.elements import ELEMENT_RULES
from tests.passes.exprs.element_samples import SAMPLES, Sample
from tests.passes.exprs.lifting import Lifted, lifted


@functools.cache
def found_with(sample: Sample, ranged: bool) -> Lifted:
    return lifted(sample.call, sample.inputs, ranged=ranged)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.name)
@pytest.mark.parametrize("ranged", [True, False], ids=["sizes known", "sizes unknown"])
def test_an_element_is_the_operators(sample: Sample, ranged: bool) -> None:
    expected = sample.call(*sample.inputs)
    found = found_with(sample, ranged)
    values = found.values(sample.inputs, expected.shape)
    torch.testing.assert_close(values.to(expected.dtype), expected, rtol=0, atol=0, equal_nan=True)
    assert found.result not in found.captured or found.result.op == "placeholder"


def test_every_row_has_a_sample() -> None:
    seen = {operator.getitem}
    for sample in SAMPLES:
        program = found_with(sample, True).program
        seen |= {node.target for node in program.graph.nodes}
    assert {str(op) for op in ELEMENT_RULES if op not in seen} == set()
