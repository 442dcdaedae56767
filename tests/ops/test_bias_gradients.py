"""Every row of the gradients of biases is what autograd finds."""

from __future__ import annotations

import pytest
import torch

from ringfx.ir.tiles.expr import TILE_OPS
from ringfx.ops.tiling.bias_gradients import PULL_RULES

NUM_OPERANDS = {"add": 2, "sub": 2, "mul": 2, "div": 2}


@pytest.mark.parametrize("head", sorted(PULL_RULES.keys() - {"where"}))
def test_a_row_is_the_derivative(head: str) -> None:
    generator = torch.Generator().manual_seed(1)
    given = [
        (torch.rand(3, 4, generator=generator, dtype=torch.float64) + 0.3).requires_grad_()
        for _ in range(NUM_OPERANDS.get(head, 1))
    ]
    result = TILE_OPS[head](*given)
    upstream = torch.rand(3, 4, generator=generator).to(result.dtype)
    expected = torch.autograd.grad(result, given, upstream)
    with torch.no_grad():
        found = PULL_RULES[head](upstream, result, *given)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours is not None
        torch.testing.assert_close(ours.to(theirs.dtype), theirs)
