"""What the parts of a dilated attention cost beside those of their attention: adding them up."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ringfx.ir.attention_spec import AttentionSpec
from ringfx.ir.dilation import Branch
from ringfx.ir.tiles import CAUSAL
from ringfx.ir.values import AttentionSite
from tests.cost_model.sites import causal_site, predicted, shipped

TOKENS, HEADS, DIM = 4096, 8, 64
FREE = replace(shipped("cpu-default"), handling_ns_per_byte=0.0, memory_gbytes_per_s=None)
SLOW = replace(FREE, memory_gbytes_per_s=1.0)
"""A second for each 10^9 bytes that are moved."""


def site(*branches: tuple[int, int]) -> AttentionSite:
    spec = AttentionSpec(
        scale=0.125, q_len=TOKENS, kv_len=TOKENS, keep=CAUSAL,
        branches=tuple(Branch(segment=w, rate=r) for w, r in branches),
    )  # fmt: skip
    sizes = {"heads": HEADS, "kv_heads": HEADS, "head_dim": DIM, "v_head_dim": DIM}
    return causal_site(
        tokens=TOKENS, spec=spec, balanced=True, dtype="float32", device="cpu", **sizes
    )


def moved_bytes(direction: str, *branches: tuple[int, int]) -> float:
    """By what the parts add to each other alone: their own merges are those of one branch each."""
    fast, slow = (predicted(site(*branches), "collective", 1, p) for p in (FREE, SLOW))
    return 1e6 * float(getattr(slow, f"{direction}_ms") - getattr(fast, f"{direction}_ms"))


@pytest.mark.parametrize(("direction", "passes"), [("forward", 5), ("backward", 3 * 3)])
def test_a_branch_that_is_added_is_read_and_written(direction: str, passes: int) -> None:
    both, first, second = ((1024, 1), (2048, 2)), ((1024, 1),), ((2048, 2),)
    rows = TOKENS * HEADS * DIM * 4 // 2  # bytes of half of the rows of all heads
    added = passes * rows
    found = moved_bytes(direction, *both) - moved_bytes(direction, *first)
    assert found == pytest.approx(moved_bytes(direction, *second), rel=1e-6)
    assert found >= added
