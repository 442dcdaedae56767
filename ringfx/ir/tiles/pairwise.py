"""Which captured tensors have an entry for each pair of a query and a key."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from ringfx.ir.tiles.expr import Expr, indices_used, reads, rows_read

__all__ = ["matrices", "matrix_rows"]


def matrices(*exprs: Expr | None) -> tuple[int, ...]:
    """Captured tensors that are read with a query index and, in another dimension, a key index."""
    found = set()
    for read in reads(*exprs):
        places = [indices_used(p) for p in read[2:]]
        if any("q" in a and "k" in b for a, b in itertools.permutations(places, 2)):
            found.add(read[1])
    return tuple(sorted(found))


def matrix_rows(*exprs: Expr | None) -> Mapping[int, int]:
    """Of ``matrices`` those read at the query's own row only: position -> dim of the rows."""
    found = set(matrices(*exprs))
    return {i: dim for i, dim in rows_read(*exprs).items() if i in found}
