"""How ranks hold a value."""

from __future__ import annotations

from enum import Enum

__all__ = ["Placement"]


class Placement(Enum):
    """How ranks hold a value, or how a call takes it; and what each rank's gradient of it is."""

    REPLICATED = "replicated"
    """Every rank holds all of it, and each rank's gradient is complete."""
    REPLICATED_PARTIAL_GRAD = "replicated_partial_grad"
    """Every rank holds all of it; each rank's gradient is its part of a sum."""
    SHARDED = "sharded"
    """Each rank holds its tokens, and the gradient is sharded alike."""
    RANK_LOCAL = "rank_local"
    """Each rank holds something of its own, such as the number of its rows for each expert."""
