"""Split modes: the ways in which a call can run on tokens that are sharded over ranks.

One class a way. It recognises the calls that it serves (``match``, asked by ``passes.place``), says
in which placement it takes each operand, and emits the call that one rank makes (``emit``, asked by
``passes.rewrite``). ``table.MODES`` lists them in the order in which they are asked.
"""

from ringfx.passes.split_modes.local_attention import LocalAttention
from ringfx.passes.split_modes.local_call import LocalCall, local_shape
from ringfx.passes.split_modes.local_graph import LocalGraph
from ringfx.passes.split_modes.mode import CannotSplit, SplitMode
from ringfx.passes.split_modes.placement import Placement
from ringfx.passes.split_modes.table import MODES, split_mode

__all__ = [
    "MODES",
    "CannotSplit",
    "LocalAttention",
    "LocalCall",
    "LocalGraph",
    "Placement",
    "SplitMode",
    "local_shape",
    "split_mode",
]
