"""Place: each value is whole or split along the tokens; the cheapest legal choice.

For every token axis one minimum cut. A value on the source side is whole (every rank holds all of
it), on the sink side split. Crossing costs the bytes that move, forward and backward; being whole
costs p times the work and memory; what an operator cannot do costs infinity:

    minimise   sum_v whole(v) * w(v)  +  sum_v [gathered(v)] * g(v)  +  sum_v [sliced(v)] * s(v)

One auxiliary vertex a value stands for its gather and one for its slice, so that one transfer
serves all users. Partial sums are derived, never chosen. An input that an earlier program left
split is split, whatever that costs (``ringfx.passes.token_axes.arrivals``).
"""

from ringfx.passes.place.min_cut import Placement, place
from ringfx.passes.place.why_replicated import why_whole

__all__ = ["Placement", "place", "why_whole"]
