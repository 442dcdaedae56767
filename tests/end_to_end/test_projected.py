"""Few keys that are made of all tokens by weights: equal, and a sum over the ranks."""

from __future__ import annotations

import pytest
import torch

from tests.models.projected import KEYS, PROJECTED, WIDE, Projected
from tests.support.sampling import one_in
from tests.support.split_here import SplitHere, split_here

WAYS = [(24, 2), (24, 3), (25, 3), (31, 2), (WIDE * 2, 2)]
"""Tokens, and ranks."""


def split(name: str, tokens: int, ranks: int) -> SplitHere:
    x = torch.randn(2, tokens, WIDE, generator=torch.Generator().manual_seed(tokens))
    return split_here(Projected(name, tokens), [x], ranks)


@pytest.mark.parametrize("name", PROJECTED)
def test_keys_that_are_made_of_all_tokens_gather_none(name: str) -> None:
    first = [*PROJECTED].index(name) % len(WAYS)
    for tokens, ranks in one_in(3, [*WAYS[first:], *WAYS[:first]]):
        found = split(name, tokens, ranks)
        assert found.worst < 1e-10, (tokens, ranks)
        assert found.gathered == [], (tokens, ranks)
        assert found.whole == []
        lengths = {line.length for line in found.program.local.placement.lines.lines}
        assert lengths == {tokens, KEYS}
