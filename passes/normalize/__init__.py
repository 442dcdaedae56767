"""Normalize: calls on tokens, written in operators that can be split."""

from ringfx.passes.normalize.pairwise_masks import separate_columns
from ringfx.passes.normalize.reshard_points import insert_reshards
from ringfx.passes.normalize.rules import normalize

__all__ = ["insert_reshards", "normalize", "separate_columns"]
