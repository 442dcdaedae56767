"""Chunks: regions in which each token is computed by itself run over a few tokens at a time.

What is wide inside such a region (an MLP's inner values, logits) then exists for one chunk only.
The split modes say which calls run on a part of the tokens: what runs on a rank's part runs on a
part of that part.
"""

from ringfx.passes.chunks.in_chunks import run_in_chunks
from ringfx.passes.chunks.outline import outlined
from ringfx.passes.chunks.region import Region, find_regions

__all__ = ["Region", "find_regions", "outlined", "run_in_chunks"]
