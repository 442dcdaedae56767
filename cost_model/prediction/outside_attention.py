"""The time of collectives outside attention: values that change their placement, and sums.

Nothing is taken to hide them, so the sum is an upper bound: backward overlaps some with compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from ringfx.cost_model.prediction.profile import Operation, Profile
from ringfx.cost_model.prediction.terms import message_seconds
from ringfx.ir.values import Collective, CommKind

__all__ = ["outside_ms"]

COLLECTIVES: Mapping[CommKind, tuple[Operation, Callable[[int], float]]] = {
    # kind:                       operation, and which share of the final bytes a rank receives
    CommKind.ALL_GATHER:          ("all_gather", lambda p: (p - 1) / p),
    CommKind.ALL_GATHER_GRADIENT: ("all_gather", lambda p: (p - 1) / p),
    CommKind.ALL_GATHER_STATES:   ("all_gather", lambda p: (p - 1) / p),
    CommKind.REDUCE_SCATTER:      ("reduce_scatter", lambda p: p - 1),
    CommKind.ALL_REDUCE:          ("all_reduce", lambda p: 1),
    CommKind.ALL_TO_ALL:          ("all_to_all", lambda p: (p - 1) / p),
}  # fmt: skip


def outside_ms(moves: Iterable[Collective], world_size: int, profile: Profile) -> float:
    """Milliseconds of one step; 0 at one rank, where nothing is sent."""
    return 1e3 * sum(_seconds(move, world_size, profile) for move in moves)


def _seconds(move: Collective, world_size: int, profile: Profile) -> float:
    ranks = move.ranks or world_size
    if move.kind not in COLLECTIVES or ranks == 1:
        return 0.0
    operation, received = COLLECTIVES[move.kind]
    return message_seconds(profile, operation, ranks, received(ranks) * move.bytes_moved)
