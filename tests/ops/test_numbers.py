"""Half precision over many ranks, and values that are not numbers."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from benchmarks.attention_schedule import Ring, simulate
from ringfx import ops
from ringfx.errors import InvalidArgument
from ringfx.layout import Layout
from ringfx.ops import finish
from ringfx.tiles import CAUSAL, Expr
from tests.ranks import RankPool

Tensor = torch.Tensor


def _fused(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool) -> list[Tensor]:
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("keep", [CAUSAL, None])
def test_the_error_does_not_grow_with_eight_ranks(dtype: torch.dtype, keep: Expr | None) -> None:
    """At most twice the single fused kernel's error against float64, in every tensor."""
    torch.manual_seed(0)
    q, k, v, dout = torch.randn(4, 1, 2, 512, 32).to(dtype)
    causal = keep is not None
    exact = _fused(q.double(), k.double(), v.double(), dout.double(), causal)
    single = _fused(q, k, v, dout, causal)
    ring = simulate(Ring(size=8, keep=keep), q, k, v, dout)
    for name, x64, theirs, ours in zip(("out", "dq", "dk", "dv"), exact, single, ring, strict=True):
        error = float((ours.double() - x64).norm())
        assert error <= 2 * float((theirs.double() - x64).norm()), (name, error)


def _with_odd_values(causal: bool) -> list[tuple[str, Tensor]]:
    """Whole outputs for inputs with one odd value each."""
    results = []
    for which, name in enumerate("qkv"):
        for value in (torch.nan, torch.inf):
            local = []
            for x in _odd(which, value):
                local.append(ops.shard(x, 2, layout="zigzag"))
            out = ops.ring_attention(*local, causal=causal, layout="zigzag", length=24)
            whole = ops.gather(out, 2, layout="zigzag", length=24)
            results.append((f"{value} in {name}", whole))
    return results


def _odd(which: int, value: float) -> list[Tensor]:
    torch.manual_seed(0)
    data = list(torch.randn(3, 1, 2, 24, 8))
    data[which][0, 0, 5, 3] = value
    return data


@pytest.mark.ranks
@pytest.mark.parametrize("causal", [False, True])
def test_odd_values_come_out_where_the_unsplit_kernel_has_them(
    ranks2: RankPool, causal: bool
) -> None:
    """With a causal mask: in the rows that attend the odd key; what 0 * nan gives in the others
    depends on a kernel's blocks."""
    for results in ranks2.run(_with_odd_values, causal):
        expected = []
        for which in range(3):
            for value in (torch.nan, torch.inf):
                q, k, v = _odd(which, value)
                expected.append(F.scaled_dot_product_attention(q, k, v, is_causal=causal))
        rows = torch.arange(24) >= (5 if causal else 0)
        for (label, ours), theirs in zip(results, expected, strict=True):
            same = torch.isclose(ours, theirs, rtol=1e-5, atol=1e-5, equal_nan=True)
            assert same[:, :, rows].all(), label


def _held_rows(length: int) -> int:
    """Rows of the longest key or value tensor that any kernel call of this rank sees."""
    from unittest import mock

    from ringfx.ops import kernels

    seen = []
    forward = kernels.CPU_FLASH.forward

    def watched(q: Tensor, k: Tensor, v: Tensor, scores: kernels.Scores) -> tuple[Tensor, Tensor]:
        seen.append(k.shape[2])
        return forward(q, k, v, scores)

    from dataclasses import replace

    with mock.patch.object(kernels, "CPU_FLASH", replace(kernels.CPU_FLASH, forward=watched)):
        size = torch.distributed.get_world_size()
        q = torch.randn(1, 2, Layout("zigzag", length, size).local_length, 8)
        ops.ring_attention(q, q, q, causal=True, layout="zigzag", length=length)
    return max(seen)


@pytest.mark.ranks
def test_no_rank_of_the_ring_ever_sees_more_than_a_block_of_keys(ranks4: RankPool) -> None:
    assert max(ranks4.run(_held_rows, 256)) <= 256 // 4


@pytest.mark.parametrize("low", [-1e9, -1e4])
def test_rows_that_a_bias_hides_wholly_are_said_and_refused_where_they_would_be_wrong(
    low: float, caplog: pytest.LogCaptureFixture
) -> None:
    finish._WARNED.clear()
    q = torch.randn(1, 2, 9, 8, requires_grad=True)
    bias = ("where", ("gt", ("q",), ("const", 3)), ("const", 0.0), ("const", low))
    out = ops.ring_attention(q, q, q, bias=bias)
    assert "a bias hides all keys of some queries" in caplog.text
    out[:, :, 4:].sum().backward()  # a loss that leaves them out
    assert q.grad is not None
    if low == -1e4:
        ops.ring_attention(q, q, q, bias=bias).sum().backward()
        return
    with pytest.raises(InvalidArgument, match=r"as low as -1e\+09; .* Do: mask with -inf"):
        ops.ring_attention(q, q, q, bias=bias).sum().backward()
