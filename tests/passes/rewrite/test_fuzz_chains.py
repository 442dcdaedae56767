"""A few drawn chains of layers; two thousand are slow."""

from __future__ import annotations

import pytest

from tests.passes.rewrite.fuzz_chains import KINDS, Chain, check

SEEDS = range(2000)
FEW = SEEDS[::125]


def wrong(seeds: range) -> dict[str, str]:
    chains = map(Chain.of, seeds)
    said = {str(chain): check(chain) for chain in chains}
    return {chain: text for chain, text in said.items() if not text.startswith("equal")}


def test_a_few_drawn_chains_are_equal_and_split() -> None:
    assert wrong(FEW) == {}


def test_what_was_wrong_once_is_equal() -> None:
    assert wrong(range(21332, 21333)) == {}  # windows that nobody splits, read along their elements


@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
def test_two_thousand_drawn_chains_are_equal_and_split(part: int) -> None:
    assert wrong(SEEDS[part::20]) == {}


def test_every_kind_is_drawn() -> None:
    assert {kind for seed in SEEDS for kind in Chain.of(seed).kinds} == {*KINDS}
