"""Frames of a video, with tokens joined to their places and to themselves: equal, and split."""

from __future__ import annotations

import pytest
import torch

from tests.models.frames import SUMMARIES, WIDE, Frames
from tests.support.sampling import one_in
from tests.support.split_here import split_here

WAYS = [(4, 16, 2), (6, 12, 3), (5, 11, 2), (7, 7, 3), (16, 5, 3)]
"""Frames, places of each, and ranks."""


@pytest.mark.parametrize("name", SUMMARIES)
def test_no_frame_is_gathered_for_what_stands_for_it(name: str) -> None:
    first = [*SUMMARIES].index(name) % len(WAYS)
    for frames, places, ranks in one_in(3, [*WAYS[first:], *WAYS[:first]]):
        video = torch.randn(
            2, frames, places, WIDE, generator=torch.Generator().manual_seed(frames)
        )
        found = split_here(Frames(name), [video], ranks)
        assert found.worst < 1e-10, (frames, places, ranks)
        assert found.gathered == [], (frames, places, ranks)
        assert found.whole == []
