"""Normalize: calls on tokens, written in operators that can be split."""

from ringfx.passes.normalize.landmarks import end_landmarks
from ringfx.passes.normalize.reshard_points import insert_reshards
from ringfx.passes.normalize.rows_and_columns import separate_columns
from ringfx.passes.normalize.rules import normalize
from ringfx.passes.normalize.turns import insert_turns

__all__ = ["end_landmarks", "insert_reshards", "insert_turns", "normalize", "separate_columns"]
