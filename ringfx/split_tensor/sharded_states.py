"""Sharded parameters that a program hands to code that is not compiled: an error by name.

While a model runs whose states are sharded, stand-ins without memory are in the place of its
parameters. Compiled programs take this rank's rows instead. Code between two programs, after a
graph break, gets what it reads from a module gathered (``ringfx.compile.uncompiled_reads``); what
a program read before and hands over would be memory that is not there.
"""

from __future__ import annotations

from typing import Any

import torch

from ringfx.errors import CaptureRefused
from ringfx.torch_compat.pytree import tree_leaves

__all__ = ["NAME_OF", "STATE_OF", "read_uncompiled", "refuse_stand_ins"]

STATE_OF = "_ringfx_state"
"""Attribute of a stand-in: the sharded parameter."""
NAME_OF = "_ringfx_name"
"""Attribute of a stand-in: the parameter's name in the model."""


def refuse_stand_ins(func: Any, given: Any) -> None:
    """Raise CaptureRefused if an operand of ``func``, in lists too, is a stand-in."""
    for value in tree_leaves(given):
        if isinstance(value, torch.nn.Parameter) and hasattr(value, STATE_OF):
            raise CaptureRefused(read_uncompiled(f"{func} of shape {[*value.shape]}"))


def read_uncompiled(what: str) -> str:
    """The text of the error."""
    return (
        f"code that is not compiled is given a parameter ({what}) of which this rank holds only "
        "its rows (shard_states). A graph break keeps this code uncompiled; the plan's notes name "
        "its source line. Do: read it from its module there, self.weight, which gathers it; or "
        "remove the graph break; or call ringfx.optimize without shard_states."
    )
