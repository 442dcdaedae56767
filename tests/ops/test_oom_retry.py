"""Out of memory at random tiles: the same result, or an error that says what would fit."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from ringfx import ops
from ringfx.comm import stats
from ringfx.errors import OutOfMemory
from ringfx.ir.attention_spec import AttentionSpec
from ringfx.ir.tiles import CAUSAL, Expr, K
from ringfx.ops.kernels import kernel as kernels
from ringfx.ops.kernels.kernel import CPU_FLASH, MATH
from ringfx.strategies.buffer_pool import BufferPool
from tests.ops.oracle import Example, assemble, difference, reference, run_all
from tests.support.ranks import RankPool

LENGTH = 300


def _failing(call: Callable[..., Any], fails: Callable[[int, int], bool]) -> Callable[..., Any]:
    """The kernel's function, but some tiles do not fit; judged by their queries and keys."""

    def wrapped(*arguments: Any) -> Any:
        q, k = arguments[-4:-2] if len(arguments) == 4 else arguments[1:3]
        if fails(q.shape[2], k.shape[2]):
            raise torch.OutOfMemoryError("injected")
        return call(*arguments)

    return wrapped


def _with_failures(fails: Callable[[int, int], bool]) -> Any:
    replaced: dict[str, Any] = {
        name: replace(
            kernel,
            forward=_failing(kernel.forward, fails),
            backward=_failing(kernel.backward, fails),
        )
        for name, kernel in (("CPU_FLASH", CPU_FLASH), ("MATH", MATH))
    }
    return mock.patch.multiple(kernels, **replaced)


def _run_failing(examples: list[Example], seed: int, share: float) -> Any:
    draw = random.Random(seed + torch.distributed.get_rank())
    stats.reset()
    with _with_failures(lambda q, k: max(q, k) > 16 and draw.random() < share):
        results = run_all(examples)
    return results, stats.snapshot()["layers.0"].retries


CHUNK = LENGTH // 4
WITHOUT_A_CHUNK: Expr = ("and", CAUSAL, ("or", ("lt", K, ("const", CHUNK)),
                                         ("ge", K, ("const", 2 * CHUNK))))  # fmt: skip
"""Rank 0 of two holds chunks 0 and 3 side by side: read as positions, 3 would be the lost one."""


@pytest.mark.ranks
@pytest.mark.parametrize("share", [0.3, 0.8])
def test_tiles_that_do_not_fit_leave_the_result_as_it_is(ranks2: RankPool, share: float) -> None:
    """Each rank fails at tiles of its own, so no message may depend on it."""
    examples = [
        Example(
            spec=AttentionSpec(scale=0.3, q_len=LENGTH, kv_len=LENGTH, keep=keep),
            strategy=strategy, layout="zigzag", label=f"{strategy} {keep}", kv_heads=2,
        )
        for strategy in ("simple", "collective", "production", "ulysses")
        for keep in (CAUSAL, WITHOUT_A_CHUNK)
    ]  # fmt: skip
    by_rank = ranks2.run(_run_failing, examples, 7, share)
    assert all(retries > 0 for _, retries in by_rank)
    results = zip(*(found for found, _ in by_rank), strict=True)
    for example, parts in zip(examples, results, strict=True):
        found = difference(assemble(example, parts), reference(example))
        assert max(found.values()) < 1e-12, (example.label, found)


def test_a_device_that_fits_nothing_is_an_error_that_says_what_would() -> None:
    q = torch.randn(1, 2, LENGTH, 8)
    with _with_failures(lambda q, k: True), pytest.raises(OutOfMemory) as raised:
        ops.ring_attention(q, q, q, causal=True, name="layers.3")
    text = str(raised.value)
    assert "layers.3: rank 0 has no memory left for a tile of 16 queries x 16 keys" in text
    assert "300 of 300 over 1 ranks. Do: use more ranks" in text


def test_other_errors_of_a_kernel_are_not_swallowed() -> None:
    q = torch.randn(1, 2, 8, 8)
    broken = replace(CPU_FLASH, forward=mock.Mock(side_effect=RuntimeError("a defect")))
    with mock.patch.object(kernels, "CPU_FLASH", broken), pytest.raises(RuntimeError) as raised:
        ops.ring_attention(q, q, q)
    assert str(raised.value) == "a defect"


def test_buffers_are_used_again_and_given_back() -> None:
    pool = BufferPool(limit=1)
    cpu = torch.device("cpu")
    first = pool.take(8, torch.float32, cpu)
    address = first.data_ptr()
    pool.give(first)
    assert pool.free_bytes == 32
    second = pool.take(16, torch.bfloat16, cpu)
    assert (second.data_ptr(), second.dtype, second.shape) == (address, torch.bfloat16, (16,))
    pool.give(second)
    pool.give(torch.empty(8))
    assert pool.free_bytes == 32
    pool.clear()
    assert pool.free_bytes == 0
