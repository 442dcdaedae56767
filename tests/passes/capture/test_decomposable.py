"""What capture takes apart has the operator's own values and gradients, also at edge points."""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import pytest
import torch
from torch._decomp import decomposition_table
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from ringfx.passes.axes.rules import find_rule
from ringfx.passes.capture.decomposable import DECOMPOSABLE
from ringfx.passes.capture.losses import LOSS_DECOMPOSITIONS
from tests.passes.capture.decomposition_samples import CALLS, EDGES, LOSSES

aten = torch.ops.aten
NOT_CALLED = {
    **dict.fromkeys(
        (aten.gru.data, aten.lstm.data, aten.rnn_relu.data, aten.rnn_tanh.data),
        "the same cells over packed sequences",
    ),
    **dict.fromkeys(
        (aten.empty_strided.default, aten.new_empty_strided.default), "holds no values"
    ),
    **dict.fromkeys(
        (
            aten.fill.Tensor, aten.linspace.Scalar_Tensor, aten.linspace.Tensor_Scalar,
            aten.linspace.Tensor_Tensor, aten.logspace.Scalar_Tensor, aten.logspace.Tensor_Scalar,
            aten.logspace.Tensor_Tensor,
        ),
        "its numbers given as tensors",
    ),
}  # fmt: skip


def test_every_row_has_a_call_or_a_reason() -> None:
    assert set(DECOMPOSABLE) == set(CALLS) | set(NOT_CALLED)
    assert set(LOSS_DECOMPOSITIONS) == set(LOSSES)


def results(function: Callable[..., Any], op: OpOverload, numbers: torch.Tensor) -> list[Any]:
    """Values, then the gradients of what they are made of."""
    x = numbers.clone().requires_grad_()
    args = {**CALLS, **LOSSES}[op](x)
    made = [v for v in pytree.tree_leaves(function(*args)) if isinstance(v, torch.Tensor)]
    total = [v for v in made if v.requires_grad]
    if not total:
        return made
    ones = [torch.ones_like(v) for v in total]
    return made + list(torch.autograd.grad(total, x, ones, allow_unused=True))


def compare(op: OpOverload, taken_apart: Callable[..., Any], edge: str) -> None:
    torch.manual_seed(0)
    own = results(op, op, EDGES[edge])
    torch.manual_seed(0)
    other = results(taken_apart, op, EDGES[edge])
    for a, b in zip_longest(own, other):
        if a is None or b is None:  # a gradient that is 0 need not be there
            assert not any(x is not None and x.any() for x in (a, b))
            continue
        # Where large numbers cancel, as much is left as the order of the sum leaves.
        finite = a[a.isfinite()] if a.is_floating_point() else a.new_empty(0)
        left = 1e-12 * max(1.0, finite.abs().max().item()) if finite.numel() else 0
        scale = max(left, 1e-14 * EDGES[edge].abs().max().item()) if finite.numel() else 0
        torch.testing.assert_close(b, a, rtol=1e-9, atol=scale, equal_nan=True)


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("op", [op for op in CALLS if op in decomposition_table], ids=str)
def test_a_decomposition_has_the_operators_values_and_gradients(op: OpOverload, edge: str) -> None:
    compare(op, decomposition_table[op], edge)


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("op", LOSSES, ids=str)
def test_a_mean_as_sum_over_count_has_the_losss_values_and_gradients(
    op: OpOverload, edge: str
) -> None:
    compare(op, LOSS_DECOMPOSITIONS[op], edge)


BELOW_AUTOGRAD = ("_backward", "_forward", "native_", "_native", "cudnn_", "_batch_norm", "_fused")


def test_nothing_that_torch_takes_apart_is_left_without_a_row() -> None:
    """Else an operator that was split once would be refused by name."""
    left = [
        str(op)
        for op in decomposition_table
        if isinstance(op, OpOverload) and op.namespace == "aten" and not op._schema.is_mutable
        and not any(a.is_out for a in op._schema.arguments)
        and not op.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
        and op not in DECOMPOSABLE and find_rule(op) is None
        and not any(word in str(op) for word in BELOW_AUTOGRAD)
    ]  # fmt: skip
    assert sorted(left) == sorted(map(str, UNSEEN))


UNSEEN = {
    aten._chunk_cat.default, aten._addmm_activation.default, aten._unsafe_masked_index.default,
    aten._unsafe_masked_index_put_accumulate.default, aten._weight_norm_interface.default,
    aten.addmm.dtype, aten.baddbmm.dtype, aten.is_same_size.default, aten.normal.float_float,
    aten.resize_as.default, aten.view_copy.dtype,
}  # fmt: skip
"""Operators that no tokens reach: made by torch's own lowerings, of weights or of sizes alone."""
