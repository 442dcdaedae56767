"""What capture spells out has the operator's own values, writes and gradients, also at edges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ringfx.passes.capture.definitions import DEFINITIONS
from tests.passes.capture.definition_samples import DEFINED, POINTS

aten = torch.ops.aten
WITHOUT_GRADIENT = {
    aten._transformer_encoder_layer_fwd.default, aten._native_multi_head_attention.default,
}  # fmt: skip


def test_every_definition_has_a_call() -> None:
    refused = {torch.ops.aten.as_strided_scatter.default}
    assert set(DEFINED) == set(DEFINITIONS) - refused


def results(function: Callable[..., Any], op: Any, call: str, numbers: torch.Tensor) -> list[Any]:
    """Values, what was written, and the gradient of what they are made of."""
    x = numbers.clone().requires_grad_(op not in WITHOUT_GRADIENT)
    args = DEFINED[op][call](x)
    torch.manual_seed(0)
    out = function(*args)
    made = [y for y in (out if isinstance(out, tuple) else (out,)) if y is not None]
    written = [a for a in args if isinstance(a, torch.Tensor) and not a.requires_grad]
    found = [y.detach() for y in (*made, *written) if y.numel() and y.is_floating_point()]
    if made[0].requires_grad:
        weights = torch.arange(made[0].numel()).view(made[0].shape).cos().to(made[0].dtype)
        found.append(torch.autograd.grad((made[0] * weights).sum(), x)[0])
    return found


def check(op: Any, call: str, point: str) -> None:
    own = results(op, op, call, POINTS[point])
    ours = results(DEFINITIONS[op], op, call, POINTS[point])
    for i, (a, b) in enumerate(zip(own, ours, strict=True)):
        if op is aten.native_layer_norm.default and i in (1, 2):  # of a row with an infinity, NaN
            is_finite = a.isfinite() & b.isfinite() & own[0].isfinite().all(-1, keepdim=True)
            a, b = a[is_finite], b[is_finite]
        finite = a[a.isfinite()]
        left = 1e-11 * max(1.0, float(finite.abs().max()) if finite.numel() else 0.0)
        torch.testing.assert_close(b, a, rtol=1e-9, atol=left, equal_nan=True)


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("op", DEFINED, ids=str)
def test_a_definition_has_the_operators_values_and_gradients(op: Any, point: str) -> None:
    for call in DEFINED[op]:
        check(op, call, point)
