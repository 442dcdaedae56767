"""The time of collectives outside attention: values that change their placement, and sums.

Their sum is an upper bound of what they add to a step. Of sharded states' messages it is said how
much of it attention's compute hides: they travel under whatever runs (``compile/prefetch.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from ringfx.cost_model.prediction.profile import Profile
from ringfx.cost_model.prediction.profile_rows import Operation
from ringfx.cost_model.prediction.terms import message_seconds
from ringfx.ir.plan import LayerPlan
from ringfx.ir.values import Collective, CommKind

__all__ = ["hidden_ms", "outside_ms"]

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


def hidden_ms(
    moves: Sequence[Collective], layers: Sequence[LayerPlan], world_size: int, profile: Profile
) -> float:
    """Milliseconds of sharded states' messages that travel under attention's compute, at least.

    In each direction all but the largest gather, and in backward the largest sum of gradients (the
    first and the last message have nothing beside them), as far as there is compute that
    attention's own messages do not hide behind. What runs outside attention hides more.
    """
    states = {move.node for move in moves if move.kind is CommKind.ALL_GATHER_STATES}
    kinds = (CommKind.ALL_GATHER_STATES, CommKind.REDUCE_SCATTER)
    found = 0.0
    for in_backward in (False, True):
        times = {
            kind: [
                1e3 * _seconds(move, world_size, profile)
                for move in moves
                if move.kind is kind and move.node in states and move.in_backward is in_backward
            ]
            for kind in kinds
        }
        others = sum(sum(ms) - max(ms, default=0.0) for ms in times.values())
        found += min(others, sum(_unused_ms(layer, in_backward) for layer in layers))
    return found


def _unused_ms(layer: LayerPlan, in_backward: bool) -> float:
    """Its compute in one direction, less what its own messages hide behind."""
    if not layer.total_ms:
        return 0.0
    share = (layer.backward_ms if in_backward else layer.forward_ms) / layer.total_ms
    own = layer.communication_ms - layer.exposed_ms
    return share * max(0.0, layer.compute_ms - own)


def _seconds(move: Collective, world_size: int, profile: Profile) -> float:
    ranks = move.ranks or world_size
    if move.kind not in COLLECTIVES or ranks == 1:
        return 0.0
    operation, received = COLLECTIVES[move.kind]
    return message_seconds(profile, operation, ranks, received(ranks) * move.bytes_moved)
