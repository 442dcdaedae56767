"""Place: each value is replicated or sharded along the tokens; the cheapest legal choice.

For every token axis one minimum cut. A value on the source side is replicated (every rank holds all
of it), on the sink side sharded. A conversion costs the bytes that move, forward and backward;
replicating costs p times the work and memory; what an operator cannot do costs infinity:

    minimise   sum_v [replicated(v)] w(v)  +  sum_v [gathered(v)] g(v)  +  sum_v [sliced(v)] s(v)

One auxiliary vertex a value stands for its gather and one for its slice, so that one transfer
serves all users. Partial sums are derived, never chosen. An input that an earlier program left
sharded is sharded, whatever that costs (``ringfx.passes.token_axes.arrivals``).
"""

from ringfx.passes.place.by_rows import by_channels, by_columns, by_rows
from ringfx.passes.place.local_sites import local_sites
from ringfx.passes.place.min_cut import PlacementMap, place
from ringfx.passes.place.why_replicated import why_replicated

__all__ = [
    "PlacementMap",
    "by_channels",
    "by_columns",
    "by_rows",
    "local_sites",
    "place",
    "why_replicated",
]
