"""The time of messages outside attention: values that change between whole and split, or sums.

Nothing is taken to hide them, so the sum is an upper bound: backward overlaps some with compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from ringfx.cost_model.prediction.profile import Collective, Profile
from ringfx.cost_model.prediction.terms import message_seconds
from ringfx.ir.values import Resharding

__all__ = ["outside_ms"]

MESSAGES: Mapping[str, tuple[Collective, Callable[[int], float]]] = {
    # kind:            collective, and what is received of the bytes that a rank has in the end
    "gather":          ("all_gather", lambda p: (p - 1) / p),
    "gather_gradient": ("all_gather", lambda p: (p - 1) / p),
    "reduce_scatter":  ("reduce_scatter", lambda p: p - 1),
    "all_reduce":      ("all_reduce", lambda p: 1),
    "exchange":        ("all_to_all", lambda p: (p - 1) / p),
}  # fmt: skip


def outside_ms(moves: Iterable[Resharding], world_size: int, profile: Profile) -> float:
    """Milliseconds of one step; 0 at one rank, where nothing is sent."""
    return 1e3 * sum(_seconds(move, world_size, profile) for move in moves)


def _seconds(move: Resharding, world_size: int, profile: Profile) -> float:
    if move.kind not in MESSAGES or world_size == 1:
        return 0.0
    operation, received = MESSAGES[move.kind]
    return message_seconds(profile, operation, world_size, received(world_size) * move.bytes_moved)
