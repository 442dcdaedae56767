"""Tile functions: masks and biases as expressions over global indices, and what is said of them."""

from ringfx.tiles.expr import (
    CAUSAL,
    TILE_OPS,
    B,
    Expr,
    H,
    K,
    Q,
    TileIndex,
    conjunction,
    dumps,
    evaluate,
    inputs_used,
    loads,
    terms,
    walk,
)
from ringfx.tiles.ranges import Box, Kind, bounds, classify
from ringfx.tiles.words import density, describe, is_balanced, matrices

__all__ = [
    "CAUSAL",
    "TILE_OPS",
    "B",
    "Box",
    "Expr",
    "H",
    "K",
    "Kind",
    "Q",
    "TileIndex",
    "bounds",
    "classify",
    "conjunction",
    "density",
    "describe",
    "dumps",
    "evaluate",
    "inputs_used",
    "is_balanced",
    "loads",
    "matrices",
    "terms",
    "walk",
]
