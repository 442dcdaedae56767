"""The conversions of tensor parallelism as calls of the flat program; each has its axis rule."""

from __future__ import annotations

from ringfx.comm import conjugate, tensor_parallel
from ringfx.passes.capture.recorded import Recorded

__all__ = ["ENTER", "GATHER", "ON_FIRST", "OWN_PART", "OWN_ROWS", "RESIZING", "SUM", "SUM_TO_PART"]

ENTER = Recorded(conjugate.identity_grad_all_reduce)
SUM = Recorded(conjugate.sum_partials)
GATHER = Recorded(tensor_parallel.gather_parts)
OWN_PART = Recorded(tensor_parallel.own_part)
SUM_TO_PART = Recorded(tensor_parallel.sum_to_part)
ON_FIRST = Recorded(tensor_parallel.on_first_rank)
OWN_ROWS = Recorded(tensor_parallel.own_rows)

RESIZING = frozenset({GATHER, OWN_PART, SUM_TO_PART})
"""Those that join or cut a dimension, their fourth operand."""
