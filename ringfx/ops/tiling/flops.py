"""What a (query, key) pair of one head costs: what is counted, and what predictions divide by."""

from __future__ import annotations

from typing import Literal

__all__ = ["flops_per_pair"]


def flops_per_pair(
    head_dim: int, v_head_dim: int, direction: Literal["forward", "backward"]
) -> int:
    """Two products forward; five backward, since the scores are computed again.

    >>> flops_per_pair(64, 64, "backward") / flops_per_pair(64, 64, "forward")
    2.5
    """
    if direction == "forward":
        return 2 * (head_dim + v_head_dim)
    return 2 * (3 * head_dim + 2 * v_head_dim)
