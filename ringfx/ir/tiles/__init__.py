"""Tile functions: masks and biases as expressions over global indices, and what is said of them."""

from ringfx.ir.tiles.counting import density, is_balanced
from ringfx.ir.tiles.evaluation import TileIndex, evaluate
from ringfx.ir.tiles.expr import (
    CAUSAL,
    FALSE,
    SCORE,
    TRUE,
    B,
    Expr,
    H,
    K,
    Q,
    children,
    conjunction,
    const,
    depth,
    dumps,
    indices_used,
    inputs_used,
    loads,
    map_children,
    of_own_rows,
    own_rows,
    reads,
    rows_read,
    terms,
    walk,
)
from ringfx.ir.tiles.operators import TILE_OPS, TileOp
from ringfx.ir.tiles.pairwise import matrices, matrix_rows
from ringfx.ir.tiles.ranges import Box, Kind, bounds, classify
from ringfx.ir.tiles.words import describe

__all__ = [
    "CAUSAL", "FALSE", "SCORE", "TILE_OPS", "TRUE", "B", "Box", "Expr", "H", "K", "Kind", "Q",
    "TileIndex", "TileOp", "bounds", "children", "classify", "conjunction", "const", "density",
    "depth", "describe", "dumps", "evaluate", "indices_used", "inputs_used", "is_balanced", "loads",
    "map_children", "matrices", "matrix_rows", "of_own_rows", "own_rows", "reads", "rows_read",
    "terms", "walk",
]  # fmt: skip
