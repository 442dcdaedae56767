"""The unsplit model without its own roundings."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from ringfx.comparison.agreement import Exact


def rounded(x: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).type_as(x)


def gradient(x: torch.Tensor, reentrant: bool | None) -> torch.Tensor:
    x = x.clone().requires_grad_()
    found = rounded(x) if reentrant is None else checkpoint(rounded, x, use_reentrant=reentrant)
    (found * torch.linspace(0, 1, x.shape[-1], dtype=x.dtype)).sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_what_checkpoints_compute_again_is_not_rounded_either(reentrant: bool | None) -> None:
    x = torch.randn(3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with Exact():
        found = gradient(x, reentrant)
    inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    given = torch.linspace(0, 1, 16, dtype=x.dtype)
    along = (given * x).mean(-1, keepdim=True)
    expected = inverse * given - inverse**3 * along * x
    assert float((found - expected).abs().max()) < 1e-13
    assert float((gradient(x, reentrant) - expected).abs().max()) > 1e-9  # which rounds
