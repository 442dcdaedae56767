"""Outputs and gradients of every strategy on every rank, against softmax written out in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from ringfx.ir.layout import Layout
from ringfx.strategies.production import hops_needed
from tests.ops.cases import KINDS, examples
from tests.ops.oracle import Example, assemble, difference, reference, run_all
from tests.support.ranks import RankPool
from tests.support.sampling import one_in

TOLERANCE = 1e-12


def assert_equal_to_unsplit(
    cases: Sequence[Example],
    pool: RankPool | None = None,
    tolerance: float = TOLERANCE,
    least_bytes: int | None = None,
) -> None:
    """Runs the cases in one call of the pool, or here as one rank, and compares each."""
    by_rank = pool.run(run_all, cases, least_bytes) if pool else [run_all(cases)]
    wrong = []
    for example, results in zip(cases, zip(*by_rank, strict=True), strict=True):
        found = difference(assemble(example, results), reference(example))
        if not max(found.values()) <= tolerance:
            wrong.append(f"{example.label}: {found}")
    assert not wrong, "\n".join(wrong)


def test_every_kind_on_one_rank() -> None:
    assert_equal_to_unsplit(list(examples(1)))


@pytest.mark.slow  # on three ranks below
@pytest.mark.ranks
def test_every_kind_on_two_ranks(ranks2: RankPool) -> None:
    assert_equal_to_unsplit(one_in(2, examples(2)), ranks2)


@pytest.mark.ranks
def test_every_kind_on_three_ranks(ranks3: RankPool) -> None:
    assert_equal_to_unsplit(one_in(2, [*examples(3)][1:]), ranks3)


@pytest.mark.slow
@pytest.mark.ranks
def test_every_kind_on_four_ranks(ranks4: RankPool) -> None:
    assert_equal_to_unsplit(list(examples(4)), ranks4)


@pytest.mark.ranks
def test_head_groups_that_travel_apart(ranks3: RankPool) -> None:
    """Messages of one head each: many steps in flight, and different ones on each rank."""
    kinds = ["causal", "documents", "alibi, trained", "grouped heads, smaller v", "cross"]
    assert_equal_to_unsplit(list(examples(3, kinds)), ranks3, least_bytes=64)


def twelve_slopes() -> tuple[torch.Tensor]:
    return (torch.rand(12, dtype=torch.float64),)


@pytest.mark.ranks
@pytest.mark.parametrize("kv_heads", [12, 6, 2, 1])
def test_ulysses_exchanges_heads_in_groups(
    ranks2: RankPool, ranks3: RankPool, kv_heads: int
) -> None:
    """Groups of K/V heads, and of the query heads of one K/V head; a bias of a number a head."""
    fields: dict[str, Any] = {
        "heads": 12,
        "kv_heads": kv_heads,
        "v_head_dim": 5,
        "strategy": "ulysses",
    }
    cases = [
        replace(KINDS[kind], label=f"{kind}, {kv_heads} K/V heads", **fields)
        for kind in ("causal", "documents", "padding, mean of v")
    ]
    alibi = replace(KINDS["alibi, trained"], make_inputs=twelve_slopes, label="alibi", **fields)
    for pool in (ranks2, ranks3):
        assert_equal_to_unsplit([*cases, alibi], pool, least_bytes=64)


@pytest.mark.ranks
def test_a_ring_that_ends_early(ranks4: RankPool) -> None:
    """In contiguous layout a window of 5 tokens needs one hop of three."""
    cases = [e for e in examples(4, ["window"]) if e.strategy == "production"]
    laid = [(e.spec, Layout(e.layout, e.spec.q_len, 4)) for e in cases]
    assert [hops_needed(spec, layout, layout) for spec, layout in laid] == [2, 4]
    assert_equal_to_unsplit(cases, ranks4, least_bytes=64)
