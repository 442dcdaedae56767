"""Sharded parameters in code that is not compiled: an error by name.

While a model runs whose states are sharded, stand-ins without memory are in the place of its
parameters. Compiled programs take this rank's rows instead; code between two programs, after a
graph break, would read memory that is not there.
"""

from __future__ import annotations

from typing import Any

import torch

from ringfx.errors import CaptureRefused
from ringfx.torch_compat.pytree import tree_leaves

__all__ = ["STATE_OF", "no_memory", "read_uncompiled", "refuse_stand_ins"]

STATE_OF = "_ringfx_state"
"""Attribute of a stand-in: the sharded parameter."""
NO_MEMORY = ("data is not allocated yet", "are out of bounds for storage of size 0")
"""How torch says it, where it says it."""


def refuse_stand_ins(func: Any, given: Any) -> None:
    """Raise CaptureRefused if an operand of ``func``, in lists too, is a stand-in."""
    for value in tree_leaves(given):
        if isinstance(value, torch.nn.Parameter) and hasattr(value, STATE_OF):
            raise CaptureRefused(read_uncompiled(f"{func} of shape {[*value.shape]}"))


def no_memory(error: BaseException) -> bool:
    """Whether an operator read a tensor without memory."""
    return any(text in str(error) for text in NO_MEMORY)


def read_uncompiled(what: str) -> str:
    """The text of the error."""
    return (
        f"code that is not compiled reads a parameter ({what}) of which this rank holds only its "
        "rows (shard_states): only compiled programs gather them. A graph break keeps this code "
        "uncompiled; the plan's notes name its source line. Do: remove the graph break; or call "
        "ringfx.optimize without shard_states."
    )
