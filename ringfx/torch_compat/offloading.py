"""torch's own moving of saved values to the host's memory.

Each name says what it is needed for and, after "Without", what a release that drops it breaks.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch._functorch import config
from torch.fx import Node

__all__ = ["is_view", "moves_saved_values", "should_move"]


def moves_saved_values() -> AbstractContextManager[None]:
    """While a program is compiled: values that ``should_move`` marks are sent to pinned memory
    after their last use in forward, and fetched before their first in backward, in the order of the
    device's other work. Without: ``offload=``."""
    found: AbstractContextManager[None] = config.patch(enable_activation_offloading=True)
    return found


def should_move(node: Node) -> None:
    """Mark a node of a joint program. Without: the same."""
    node.meta["should_offload"] = True


def is_view(node: Node) -> bool:
    """Whether torch takes it for a view, which it does not move."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target.is_view
