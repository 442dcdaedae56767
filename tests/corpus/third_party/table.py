"""All models, by package."""

from __future__ import annotations

from tests.corpus.third_party import diffusion, tokens, vision
from tests.corpus.third_party.row import Row

__all__ = ["DISTRIBUTIONS", "ROWS"]

ROWS: tuple[Row, ...] = (*vision.ROWS, *tokens.ROWS, *diffusion.ROWS)

DISTRIBUTIONS = {"open_clip": "open_clip_torch"}
"""Names of distributions that are not the package's."""
