"""Half precision over many ranks, and values that are not numbers."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from benchmarks.attention_schedule import Ring, simulate
from ringfx import ops
from ringfx.errors import InvalidArgument
from ringfx.ir.layout import Layout
from ringfx.ir.tiles import CAUSAL, Expr, K, Q, TileIndex, evaluate
from ringfx.ops.tiling import empty_rows
from tests.support.ranks import RankPool

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

    from ringfx.ops.kernels import kernel

    seen = []
    forward = kernel.CPU_FLASH.forward

    def watched(q: Tensor, k: Tensor, v: Tensor, scores: kernel.Scores) -> tuple[Tensor, Tensor]:
        seen.append(k.shape[2])
        return forward(q, k, v, scores)

    from dataclasses import replace

    with mock.patch.object(kernel, "CPU_FLASH", replace(kernel.CPU_FLASH, forward=watched)):
        size = torch.distributed.get_world_size()
        q = torch.randn(1, 2, Layout("zigzag", length, size).local_length, 8)
        ops.ring_attention(q, q, q, causal=True, layout="zigzag", length=length)
    return max(seen)


@pytest.mark.ranks
def test_no_rank_of_the_ring_ever_sees_more_than_a_block_of_keys(ranks4: RankPool) -> None:
    assert max(ranks4.run(_held_rows, 256)) <= 256 // 4


LENGTH = 46
LOWEST = torch.finfo(torch.float32).min
LOW_NUMBERS = (-1e4, -1e9, -3e12, LOWEST)


def _hidden_rows(low: float) -> Expr:
    """Causal, and the first keys are padding: their own queries keep no key. Both add up."""
    later, padded = ("gt", K, Q), ("lt", K, ("const", 20))
    once = low if low == LOWEST else 2 * low
    both = ("where", padded, ("const", once), ("const", low))
    return ("where", later, both, ("where", padded, ("const", low), ("const", 0.0)))


def _hidden_case() -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(3)
    q, dout = torch.randn(2, 1, 6, LENGTH, 8)
    k, v = torch.randn(2, 1, 3, LENGTH, 8)
    return [q, k, v], dout


def _unsplit_hidden(low: float, sinks: Tensor | None) -> list[Tensor]:
    (q, k, v), dout = _hidden_case()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    places = torch.arange(LENGTH)
    index = TileIndex(b=torch.arange(1), h=torch.arange(6), q=places, k=places, row=places)
    scores = q @ k.mT / 8**0.5 + evaluate(_hidden_rows(low), index, ())
    if sinks is not None:
        scores = torch.cat([scores, sinks[None, :, None, None].expand(1, 6, LENGTH, 1)], dim=-1)
    out = scores.softmax(-1)[..., :LENGTH] @ v
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def _ring_hidden(strategy: str, low: float, sinks: Tensor | None) -> list[Tensor]:
    tensors, dout = _hidden_case()
    local = [ops.shard(x, 2, layout="zigzag").requires_grad_() for x in tensors]
    out = ops.ring_attention(
        *local,
        strategy=strategy,
        layout="zigzag",
        length=LENGTH,
        bias=_hidden_rows(low),
        sinks=sinks,
    )
    grads = torch.autograd.grad(out, local, ops.shard(dout, 2, layout="zigzag"))
    found = (out.detach(), *grads)
    return [ops.gather(x, 2, layout="zigzag", length=LENGTH) for x in found]


def _all_hidden() -> list[tuple[str, float, Tensor | None, list[Tensor]]]:
    found = []
    for low in LOW_NUMBERS:
        for strategy in ("simple", "collective", "production", "ulysses"):
            for sinks in (None, torch.linspace(-1, 1, 6)):
                label = f"{strategy}, {low}, {'with' if sinks is not None else 'no'} sinks"
                found.append((label, low, sinks, _ring_hidden(strategy, low, sinks)))
    return found


@pytest.mark.ranks
@pytest.mark.parametrize("size", [2, 3])
def test_rows_that_a_bias_hides_wholly_are_the_unsplit_models(
    size: int, request: pytest.FixtureRequest
) -> None:
    """Float32 rounds their scores away: all their keys share the weight, split or not."""
    pool: RankPool = request.getfixturevalue(f"ranks{size}")
    for results in pool.run(_all_hidden):
        for label, low, sinks, ours in results:
            theirs = _unsplit_hidden(low, sinks)
            for name, x, expected in zip(("out", "dq", "dk", "dv"), ours, theirs, strict=True):
                error = float((x - expected).abs().max() / expected.abs().max())
                # Scores near -1e4 are rounded by 1e-3, by other sums to other neighbours.
                assert error < (5e-3 if low == -1e4 else 2e-5), (label, name, error)


def test_rows_of_float64_whose_scores_keep_few_digits_are_said_and_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    empty_rows._WARNED.clear()
    q = torch.randn(1, 2, 9, 8, dtype=torch.float64, requires_grad=True)
    bias = ("where", ("gt", Q, ("const", 3)), ("const", 0.0), ("const", -1e13))
    out = ops.ring_attention(q, q, q, bias=bias)
    assert "a bias hides all keys of some queries" in caplog.text
    out[:, :, 4:].sum().backward()  # a loss that leaves them out
    assert q.grad is not None
    with pytest.raises(InvalidArgument, match=r"between -2.1e\+09 and -5.8e\+17, .* Do: mask with"):
        ops.ring_attention(q, q, q, bias=bias).sum().backward()
