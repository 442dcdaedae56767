"""Pools whose results alone are tokens that attend: equal, and pixels are split as they are."""

from __future__ import annotations

import pytest
import torch

from tests.models.pyramids import POOLED, Pyramid
from tests.support.sampling import one_in
from tests.support.split_here import split_here

WAYS = [(16, 2), (24, 3), (20, 3)]
"""Rows of pixels, and ranks."""


@pytest.mark.parametrize("name", POOLED)
def test_pixels_of_pooled_tokens_are_split_too(name: str) -> None:
    first = [*POOLED].index(name) % len(WAYS)
    for rows, ranks in one_in(len(WAYS), [*WAYS[first:], *WAYS[:first]]):
        image = torch.randn(2, 3, rows, 8, generator=torch.Generator().manual_seed(rows))
        found = split_here(Pyramid(name), [image], ranks)
        assert found.worst < 1e-10, (rows, ranks)
        assert found.whole == []
        assert found.gathered == []
