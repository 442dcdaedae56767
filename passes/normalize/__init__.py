"""Calls on tokens brought into operators that the placement can split."""

from ringfx.passes.normalize.pairwise_masks import part_columns
from ringfx.passes.normalize.reshard_points import insert_relays
from ringfx.passes.normalize.rules import respell

__all__ = ["insert_relays", "part_columns", "respell"]
