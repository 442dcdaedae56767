"""Every row of the gradients of biases is what autograd finds."""

from __future__ import annotations

import pytest
import torch

from ringfx.ir.tiles import TILE_OPS


@pytest.mark.parametrize("head", [n for n, op in TILE_OPS.items() if op.pull and n != "where"])
def test_a_row_is_the_derivative(head: str) -> None:
    generator = torch.Generator().manual_seed(1)
    given = [
        (torch.rand(3, 4, generator=generator, dtype=torch.float64) + 0.3).requires_grad_()
        for _ in range(TILE_OPS[head].arity)
    ]
    result = TILE_OPS[head].evaluate(*given)
    upstream = torch.rand(3, 4, generator=generator).to(result.dtype)
    expected = torch.autograd.grad(result, given, upstream)
    with torch.no_grad():
        pull = TILE_OPS[head].pull
        assert pull is not None
        found = pull(upstream, result, *given)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours is not None
        torch.testing.assert_close(ours.to(theirs.dtype), theirs)
