"""Modes that see every operator, and how to leave them.

Each name says what it is needed for and, after "Without", what a release that drops it breaks.
"""

from __future__ import annotations

from typing import Any

import torch.utils._mode_utils
import torch.utils._python_dispatch as python_dispatch
import torch.utils.checkpoint

__all__ = [
    "CachingMode", "TorchDispatchMode", "active_modes", "disable_current_modes", "no_dispatch",
]  # fmt: skip

TorchDispatchMode = python_dispatch.TorchDispatchMode
"""Base of a mode that sees every operator. Without: autocast, selective checkpoints, plans of
models that read values."""

disable_current_modes = python_dispatch._disable_current_modes
"""Computing in the middle of tracing as if nothing traced. Without: proofs of attention, masks
from buffers, the ranks' rendezvous."""

no_dispatch = torch.utils._mode_utils.no_dispatch
"""Operators on the parts of a subclass, below its own dispatch. Without: split tensors."""

CachingMode = torch.utils.checkpoint._CachingTorchDispatchMode
"""What a context of selective checkpointing enters; it carries the policy. Without: policies."""


def active_modes() -> list[Any]:
    """Modes under which Dynamo traces nothing. Without: naming them where a call ran unsplit."""
    return python_dispatch._get_current_dispatch_mode_stack()
