"""Streams that are joined for attention: equal, and the short one is split as the long one is."""

from __future__ import annotations

import pytest
import torch

from tests.models.streams import FEW, IN_LINE, JOINED, WIDE, Streams
from tests.support.sampling import one_in
from tests.support.split_here import SplitHere, split_here

WAYS = [(FEW, 18, 2), (FEW, 30, 3), (7, 20, 2), (7, 25, 3), (12, 13, 3), (WIDE, 4 * WIDE, 2)]
"""Tokens of the short stream, of the long one, and ranks: lengths that divide and that do not."""


def tokens(count: int) -> torch.Tensor:
    return torch.randn(2, count, WIDE, generator=torch.Generator().manual_seed(count))


def split(name: str, few: int, many: int, ranks: int) -> SplitHere:
    return split_here(Streams(name), [tokens(few), tokens(many)], ranks)


def exchanged(found: SplitHere) -> set[bool]:
    """Whether a short stream is, forwards and backwards."""
    moves = found.program.plan.collectives
    return {m.in_backward for m in moves if m.kind == "all_to_all"}


@pytest.mark.parametrize("name", JOINED)
def test_a_short_stream_is_a_line_of_its_own(name: str) -> None:
    first = [*JOINED].index(name) % len(WAYS)
    for few, many, ranks in one_in(3, [*WAYS[first:], *WAYS[:first]]):
        found = split(name, few, many, ranks)
        assert found.worst < 1e-10, (few, many, ranks)
        assert found.whole == []
        assert found.gathered == []
        lengths = {line.length for line in found.program.local.placement.lines.lines}
        assert any(few <= length <= few + 3 for length in lengths), (lengths, few, many, ranks)
        assert exchanged(found) == {False, True}


@pytest.mark.parametrize("name", IN_LINE)
def test_what_is_joined_alone_stays_where_it_is(name: str) -> None:
    found = split(name, 7, 25, 3)
    assert found.worst < 1e-10
    assert exchanged(found) == set()
    assert [line.length for line in found.program.local.placement.lines.lines] == [32]
